"""The interface between the engine and a config file, whichever style the file has."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from dr2net_d2.config import warn_of_limits
from dr2net_d2.d2.checks import check_batch_size, check_datasets, check_weights
from dr2net_d2.d2.trainer import Results, Settings, Trainer

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Keys:
    """The names that a config style has for values which errors of both styles mention."""

    weights: str
    output_dir: str
    batch_size: str


@dataclass(frozen=True)
class Optimization:
    """What only a training has: its optimizer, and the schedule of the learning rates."""

    optimizer: torch.optim.Optimizer
    lr_scheduler: Any


class Experiment(ABC):
    """A training, or an evaluation, as a config file describes it.

    The constructor checks everything, then builds the model and whatever a training needs; it
    writes nothing. It calls the methods with a leading underscore once each, in the order in which
    they are declared, except where their docstrings say otherwise. Afterwards ``engine.run`` calls
    ``warn``, then either ``evaluate`` or ``trainer``, and finally ``test_set``.

    Args:
        args: as for ``engine.run``.

    Attributes:
        cfg: the config, with the overrides of the command line.
        settings: how the training runs.
        model: the detector on its device, with random weights.
        splits: the splits that this run reads: "test" alone for an evaluation.

    Raises:
        UserError: the config, a dataset or the path of the weights cannot be used.
    """

    KEYS: ClassVar[Keys]

    def __init__(self, args: argparse.Namespace) -> None:
        self.splits: tuple[Split, ...] = ("test",) if args.eval_only else ("train", "test")
        self.cfg = self._load(args)
        self._validate_config()
        self._densest = self._check_datasets()
        self.settings = self._build_settings()
        if not args.eval_only:
            check_batch_size(
                key=self.KEYS.batch_size,
                images=self._images_per_iteration(),
                accumulation_steps=self.settings.accumulation_steps,
            )
        check_weights(
            args,
            self.weights,
            self.settings.output_dir,
            weights_key=self.KEYS.weights,
            output_key=self.KEYS.output_dir,
        )
        seed = self.settings.seed
        seed_all_rng(None if seed < 0 else seed + comm.get_rank())
        self.model = self._build_model()
        self._validate_model()
        self._optimization = None if args.eval_only else self._build_optimization()

    @property
    @abstractmethod
    def weights(self) -> str:
        """Path or URL of the weights to start from or to evaluate; empty for random ones."""

    @abstractmethod
    def _load(self, args: argparse.Namespace) -> Any:
        """Read the config file and apply the overrides."""

    @abstractmethod
    def _validate_config(self) -> None:
        """Refuse values that can be judged without datasets and without a model."""

    @abstractmethod
    def _dataset_names(self, split: Split) -> list[str]:
        """The datasets of a split; also called by ``warn``."""

    @abstractmethod
    def _num_classes(self) -> tuple[str, int] | None:
        """The model's number of classes after its key; None where the config does not tell."""

    @abstractmethod
    def _build_settings(self) -> Settings:
        """Translate the config; the datasets have been registered and checked."""

    @abstractmethod
    def _images_per_iteration(self) -> int:
        """The images of one iteration, over all processes and accumulation steps.

        Not called for an evaluation; called again for the train loader.
        """

    @abstractmethod
    def _build_model(self) -> nn.Module:
        """Build the detector on its device; the random generators have been seeded."""

    @abstractmethod
    def _validate_model(self) -> None:
        """Refuse a model that could be trained but not evaluated as the config asks."""

    @abstractmethod
    def _build_optimization(self) -> Optimization:
        """Shard the model if the config says so, then build its optimizer; for a training only."""

    @abstractmethod
    def _box_limits(self, split: Split) -> dict[str, int]:
        """The limits on the number of boxes in an image, by key; only called by ``warn``."""

    @abstractmethod
    def _train_loader(self, batch_size: int) -> Any:
        """Build Detectron2's train loader; only called by ``trainer``.

        Args:
            batch_size: images in a batch, over all processes.
        """

    def _extra_hooks(self, batch_size: int) -> list[HookBase]:
        """Hooks to run before checkpoints are written; only called by ``trainer``, first."""
        return []

    @abstractmethod
    def evaluate(self, model: nn.Module, final: bool) -> Results:
        """Evaluate a model on the test datasets.

        Args:
            model: ``self.model``, with whatever weights it has at that time.
            final: whether this is the last evaluation of the run.

        Returns:
            Detectron2's results.
        """

    @abstractmethod
    def test_set(self) -> str | None:
        """The dataset whose results file is in the output folder after an evaluation."""

    def warn(self) -> None:
        """Log a warning where images have more objects than the limits on boxes let through."""
        for split in self.splits:
            names = self._densest.keys() & {*self._dataset_names(split)}
            warn_of_limits(self._box_limits(split), {name: self._densest[name] for name in names})

    def trainer(self) -> Trainer:
        """Build the trainer, which reads the annotations of the train datasets."""
        assert self._optimization is not None, "an evaluation has nothing to train with"
        batch_size = self._images_per_iteration() // self.settings.accumulation_steps
        extra_hooks = self._extra_hooks(batch_size)
        return Trainer(
            model=self.model,
            optimizer=self._optimization.optimizer,
            lr_scheduler=self._optimization.lr_scheduler,
            train_loader=self._train_loader(batch_size),
            evaluate=self.evaluate,
            settings=self.settings,
            extra_hooks=extra_hooks,
        )

    def _check_datasets(self) -> dict[str, int]:
        """Register and check the datasets; returns the objects of the densest image of each."""
        classes = self._num_classes()
        if classes is None:
            return {}
        key, num_classes = classes
        names = [name for split in self.splits for name in self._dataset_names(split)]
        return check_datasets(key, num_classes, names)
