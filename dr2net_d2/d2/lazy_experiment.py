"""A LazyConfig of Detectron2's: checked, and translated to what ``Trainer`` takes."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from dr2net_d2.commands import torch_device
from dr2net_d2.config import LEAN_PARTS, amp_dtype, warn_of_limits
from dr2net_d2.core import CoefficientSchedule, reversible_stacks
from dr2net_d2.d2.backbone import without_cropping
from dr2net_d2.d2.checks import check_batch_size, check_datasets, check_weights, model_limits
from dr2net_d2.d2.data import tile_dicts
from dr2net_d2.d2.detector import make_lean
from dr2net_d2.d2.sharding import shard
from dr2net_d2.d2.sliced_detector import SlicedDetector
from dr2net_d2.d2.trainer import Results, Settings, Trainer
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
"""What Detectron2's own configs have, common/train.py and the like."""


class LazyExperiment:
    """A training, or an evaluation, that a LazyConfig describes. Nothing has been written yet.

    It reads the fields of Detectron2's tools/lazyconfig_train_net.py, so its own configs run. Ours
    may have besides, with their defaults elsewhere: train.seed, train.amp.dtype,
    train.accumulation_steps, train.ema_decay, train.fsdp, train.best_metric,
    train.expected_results, and dr2net.{schedule, lean, allow_partial, slicing}.

    Args:
        args: of ``engine.run``.

    Attributes:
        cfg, settings, weights, model: see ``YamlExperiment``.

    Raises:
        UserError: the config, a dataset or the path of the weights cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.cfg = cfg = load_lazy_config(args.config_file, args.opts)
        self._train, self._own = cfg.train, cfg.get("dr2net", {})
        self.weights = self._train.init_checkpoint
        torch_device(self._train.device, "train.device")
        self._splits = ("test",) if args.eval_only else ("train", "test")
        self._densest = self._check_datasets()
        self.settings = self._settings()
        if not args.eval_only:
            loader, steps = cfg.dataloader.train, self.settings.accumulation_steps
            key = "dataloader.train.total_batch_size"
            self._batch = check_batch_size(key, loader.total_batch_size, steps)
        names = ("train.init_checkpoint", "train.output_dir")
        check_weights(args, self.weights, self.settings.output_dir, *names)
        seed = self.settings.seed
        seed_all_rng(None if seed < 0 else seed + comm.get_rank())
        with lazily("model"):
            self.model = without_cropping(instantiate(cfg.model)).to(self._train.device)
            if reversible_stacks(self.model):
                make_lean(self.model, self._own.get("lean", LEAN_PARTS))
        self._test_loader, self._sliced = self._evaluation()
        self._sliced(self.model)  # refuses what cannot be sliced before anything is trained
        if not args.eval_only:
            if self._train.get("fsdp", False):
                with lazily("train.fsdp"):
                    shard(self.model, self._train.ddp.get("fp16_compression", False))
            with lazily("optimizer"):
                cfg.optimizer.params.model = self.model
                self._optimizer = instantiate(cfg.optimizer)
                # Not a part of the config that is written to the output folder.
                del cfg.optimizer.params.model
            with lazily("lr_multiplier"):
                self._lr_multiplier = instantiate(cfg.lr_multiplier)

    def _settings(self) -> Settings:
        train = self._train
        with lazily("train, dr2net"):
            return Settings(
                output_dir=train.output_dir,
                max_iter=train.max_iter,
                schedule=instantiate(self._own.get("schedule", CoefficientSchedule())),
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
                allow_partial=[*self._own.get("allow_partial", ())],
                ddp=train.ddp,
            )

    def _check_datasets(self) -> dict[str, int]:
        for path in ("model.roi_heads.num_classes", "model.num_classes"):
            num_classes = OmegaConf.select(self.cfg, path)
            if num_classes is not None:
                names = [name for split in self._splits for name in self._names(split)]
                return check_datasets(path, num_classes, names)
        return {}

    def warn(self) -> None:
        """Log what will run, but hardly as it was meant."""
        for split in self._splits:
            names = self._densest.keys() & {*self._names(split)}
            densest = {name: self._densest[name] for name in names}
            warn_of_limits(self._limits(split), densest)

    def _limits(self, split: str) -> dict[str, int]:
        """Those of an image, by path; the model's are a tile's where it sees tiles."""
        if split == "test" and "slicing" in self._own:
            return {"dr2net.slicing.max_detections": instantiate(self._own.slicing).max_detections}
        if split == "train" and self.cfg.dataloader.train.dataset._target_ is tile_dicts:
            return {}
        return model_limits(self.model, split == "train")

    def _names(self, split: str) -> list[str]:
        """Those of the datasets, if the loader reads datasets by names."""
        names = OmegaConf.select(self.cfg.dataloader, f"{split}.dataset.names")
        return [names] if isinstance(names, str) else [*(names or ())]

    def trainer(self) -> Trainer:
        """Reads the training images' annotations."""
        loader = self.cfg.dataloader.train.copy()
        loader.total_batch_size = self._batch
        if self.settings.seed >= 0 and loader._target_ is build_detection_train_loader:
            # With a generator of its own the loader leaves the global one alone when it starts.
            loader.seed = self.settings.seed
        with lazily("dataloader.train"):
            train_loader = instantiate(loader)
        return Trainer(
            self.model,
            self._optimizer,
            self._lr_multiplier,
            train_loader,
            self.evaluate,
            self.settings,
        )

    def _evaluation(self) -> tuple[DictConfig, Callable[[nn.Module], nn.Module]]:
        """The test loader, lazily, and what a model becomes for it: dr2net.slicing goes over tiles.

        The augmentations of the loader's mapper are then those of the tiles.
        """
        loader = copy.deepcopy(self.cfg.dataloader.test)
        if "slicing" not in self._own:
            return loader, lambda model: model
        with lazily("dr2net.slicing"):
            slicing = instantiate(self._own.slicing)
            augmentations = instantiate(loader.mapper.augmentations)
            loader.mapper.augmentations = []
        return loader, lambda model: SlicedDetector(model, slicing, augmentations)

    def evaluate(self, model: nn.Module, final: bool) -> Results:
        """Detectron2's results; empty without an evaluator. The final ones are as all others."""
        if "evaluator" not in self.cfg.dataloader:
            return {}
        with lazily("dataloader"):
            loader = instantiate(self._test_loader)
            evaluator = instantiate(self.cfg.dataloader.evaluator)
        results: Results = inference_on_dataset(self._sliced(model), loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results

    def test_set(self) -> str | None:
        """The dataset that was evaluated."""
        return next(iter(self._names("test")), None)


def load_lazy_config(config_file: str, overrides: Sequence[str]) -> DictConfig:
    """A LazyConfig file with ``key=value`` overrides.

    Raises:
        ConfigError: no such file, an error in it, a field that is missing, an override of a field
            that does not exist.
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
    """A key that exists, or a new argument of what is called, or one of our optional fields."""
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
"""Fields that Detectron2's configs lack and ``LazyExperiment`` reads."""


@contextmanager
def lazily(part: str) -> Iterator[None]:
    """Turn whatever the Python of a config raises into a ConfigError that names the part."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{part}: {type(error).__name__}: {reason}") from error
