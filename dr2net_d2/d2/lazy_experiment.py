"""LazyConfigs: checked, and translated into a model, an optimizer and ``Settings``."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from dr2net_d2.commands import torch_device
from dr2net_d2.config import LEAN_PARTS, amp_dtype
from dr2net_d2.core import CoefficientSchedule, reversible_stacks
from dr2net_d2.d2.backbone import without_cropping
from dr2net_d2.d2.checks import model_limits
from dr2net_d2.d2.data import tile_dicts
from dr2net_d2.d2.detector import make_lean
from dr2net_d2.d2.experiment import Experiment, Keys, Optimization, Split
from dr2net_d2.d2.sharding import shard
from dr2net_d2.d2.sliced_detector import SlicedDetector
from dr2net_d2.d2.trainer import Results, Settings
from dr2net_d2.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

REQUIRED = (
    "model",
    "optimizer.params",
    "lr_multiplier",
    "dataloader.train.total_batch_size",
    "dataloader.test",
    "train.output_dir",
    "train.init_checkpoint",
    "train.max_iter",
    "train.device",
    "train.amp.enabled",
    "train.ddp",
    "train.checkpointer",
    "train.eval_period",
    "train.log_period",
)
"""Fields that every LazyConfig of Detectron2 has, by common/train.py and the like."""


class LazyExperiment(Experiment):
    """A training, or an evaluation, as a LazyConfig describes it; see ``Experiment``.

    It reads the fields of Detectron2's tools/lazyconfig_train_net.py, so Detectron2's own configs
    run. Fields of ours are optional: train.seed, train.amp.dtype, train.accumulation_steps,
    train.ema_decay, train.fsdp, train.best_metric, train.expected_results, and
    dr2net.{schedule, lean, allow_partial, slicing}.
    """

    KEYS = Keys(
        weights="train.init_checkpoint",
        output_dir="train.output_dir",
        batch_size="dataloader.train.total_batch_size",
    )
    cfg: DictConfig

    @property
    def weights(self) -> str:
        weights: str = self.cfg.train.init_checkpoint
        return weights

    @property
    def _dr2net(self) -> Mapping[str, Any]:
        dr2net: Mapping[str, Any] = self.cfg.get("dr2net", {})
        return dr2net

    def _load(self, args: argparse.Namespace) -> DictConfig:
        return load_lazy_config(args.config_file, args.opts)

    def _validate_config(self) -> None:
        torch_device(self.cfg.train.device, "train.device")

    def _dataset_names(self, split: Split) -> list[str]:
        """The datasets, if the loader takes them by name."""
        names = OmegaConf.select(self.cfg.dataloader, f"{split}.dataset.names")
        return [names] if isinstance(names, str) else [*(names or ())]

    def _num_classes(self) -> tuple[str, int] | None:
        for path in ("model.roi_heads.num_classes", "model.num_classes"):
            num_classes = OmegaConf.select(self.cfg, path)
            if num_classes is not None:
                return path, num_classes
        return None

    def _build_settings(self) -> Settings:
        train = self.cfg.train
        with lazily("train, dr2net"):
            return Settings(
                output_dir=train.output_dir,
                max_iter=train.max_iter,
                schedule=instantiate(self._dr2net.get("schedule", CoefficientSchedule())),
                seed=train.get("seed", -1),
                amp_dtype=amp_dtype(
                    train.amp.enabled, train.amp.get("dtype", "float16"), train.device
                ),
                accumulation_steps=train.get("accumulation_steps", 1),
                ema_decay=train.get("ema_decay", 0.0),
                eval_period=train.eval_period,
                checkpoint_period=train.checkpointer.period,
                max_checkpoints=train.checkpointer.get("max_to_keep"),
                log_period=train.log_period,
                best_metric=train.get("best_metric", ""),
                expected_results=train.get("expected_results", ()),
                allow_partial=[*self._dr2net.get("allow_partial", ())],
                ddp=train.ddp,
            )

    def _images_per_iteration(self) -> int:
        images: int = self.cfg.dataloader.train.total_batch_size
        return images

    def _build_model(self) -> nn.Module:
        with lazily("model"):
            model = without_cropping(instantiate(self.cfg.model)).to(self.cfg.train.device)
            if reversible_stacks(model):
                make_lean(model, self._dr2net.get("lean", LEAN_PARTS))
        return model

    def _validate_model(self) -> None:
        self._sliced(self.model)

    def _build_optimization(self) -> Optimization:
        cfg = self.cfg
        if cfg.train.get("fsdp", False):
            with lazily("train.fsdp"):
                shard(self.model, fp16_compression=cfg.train.ddp.get("fp16_compression", False))
        with lazily("optimizer"):
            cfg.optimizer.params.model = self.model
            optimizer = instantiate(cfg.optimizer)
            # The config is written to the output folder, where a model has no place.
            del cfg.optimizer.params.model
        with lazily("lr_multiplier"):
            return Optimization(optimizer, instantiate(cfg.lr_multiplier))

    def _box_limits(self, split: Split) -> dict[str, int]:
        """The model's own limits count per tile where it sees tiles, so they are left out there."""
        if split == "test" and "slicing" in self._dr2net:
            slicing = instantiate(self._dr2net["slicing"])
            return {"dr2net.slicing.max_detections": slicing.max_detections}
        if split == "train" and self.cfg.dataloader.train.dataset._target_ is tile_dicts:
            return {}
        return model_limits(self.model, training=split == "train")

    def _train_loader(self, batch_size: int) -> Any:
        loader = self.cfg.dataloader.train.copy()
        loader.total_batch_size = batch_size
        if self.settings.seed >= 0 and loader._target_ is build_detection_train_loader:
            # With a seed of its own the loader starts without touching the global generators.
            loader.seed = self.settings.seed
        with lazily("dataloader.train"):
            return instantiate(loader)

    def _sliced(self, model: nn.Module) -> nn.Module:
        """``model``, wrapped to go over tiles if dr2net.slicing asks for it.

        The wrapper then applies the augmentations of the test loader's mapper to each tile.
        """
        if "slicing" not in self._dr2net:
            return model
        with lazily("dr2net.slicing"):
            slicing = instantiate(self._dr2net["slicing"])
            augmentations = instantiate(self.cfg.dataloader.test.mapper.augmentations)
        return SlicedDetector(model, slicing=slicing, augmentations=augmentations)

    def _test_loader(self) -> Any:
        loader = copy.deepcopy(self.cfg.dataloader.test)
        if "slicing" in self._dr2net:
            loader.mapper.augmentations = []
        return instantiate(loader)

    def evaluate(self, model: nn.Module, final: bool) -> Results:
        """Evaluate on dataloader.test; the last evaluation is like all others.

        Returns:
            Detectron2's results; empty where the config has no evaluator.
        """
        if "evaluator" not in self.cfg.dataloader:
            return {}
        with lazily("dataloader"):
            loader = self._test_loader()
            evaluator = instantiate(self.cfg.dataloader.evaluator)
        results: Results = inference_on_dataset(self._sliced(model), loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results

    def test_set(self) -> str | None:
        return next(iter(self._dataset_names("test")), None)


def load_lazy_config(config_file: str, overrides: Sequence[str]) -> DictConfig:
    """Load a LazyConfig file and apply ``key=value`` overrides.

    Raises:
        ConfigError: the file does not exist, has an error or lacks a field, or an override names a
            field that does not exist.
    """
    if not Path(config_file).is_file():
        raise ConfigError(f"config file {config_file!r} does not exist; see configs/ for some")
    with lazily(f"config file {config_file}"):
        cfg: DictConfig = LazyConfig.load(config_file)
    for path in REQUIRED:
        if OmegaConf.select(cfg, path) is None:
            raise ConfigError(
                f"config file {config_file} lacks {path!r}; start from those of Detectron2's "
                "configs/common, or of our configs/common"
            )
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: a LazyConfig takes key=value")
        _check_key(cfg, key)
    with lazily("command line"):
        LazyConfig.apply_overrides(cfg, [*overrides])
    return cfg


def _check_key(cfg: DictConfig, key: str) -> None:
    """Refuse a key, unless it exists, is a new argument of a call, or an optional field of ours."""
    parent, _, name = key.rpartition(".")
    node: Any = OmegaConf.select(cfg, parent) if parent else cfg
    known = OPTIONAL.get(parent, ())
    if isinstance(node, ListConfig) or name in known:
        return
    if not isinstance(node, DictConfig) or not (name in node or "_target_" in node):
        fields = [*node, *known] if isinstance(node, DictConfig) else [*cfg]
        raise ConfigError(f"override of {key!r}, which does not exist; known are {fields}")


OPTIONAL: dict[str, tuple[str, ...]] = {
    "train": ("seed", "accumulation_steps", "ema_decay", "fsdp", "best_metric", "expected_results"),
    "train.amp": ("dtype",),
    "dr2net": ("slicing",),
}
"""Optional fields that ``LazyExperiment`` reads and Detectron2's own configs lack, by parent."""


@contextmanager
def lazily(part: str) -> Iterator[None]:
    """Turn whatever a config's Python code raises into a ConfigError that names ``part``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{part}: {type(error).__name__}: {reason}") from error
