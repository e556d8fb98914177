"""What the planner asks of a training engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dr2net_d2.plan.simulation import DefiniteSizes


class PlannedEngine(ABC):
    """A training engine whose iteration the planner can rehearse on fake tensors.

    ``DryRun`` calls ``build``, ``stride`` and ``sample_in_full`` once each, in this order. Each
    iteration then calls ``inputs``, and runs the model within ``training``.

    Attributes:
        keeps_inputs: whether the engine's training holds the inputs that it moved to the GPU until
            the backward has ended. Otherwise they are freed with the last use in the forward.
    """

    keeps_inputs: ClassVar[bool]

    @abstractmethod
    def build(self, cfg: CfgNode, stock: bool) -> nn.Module:
        """Build the detector that the engine would train; called within ``parameters_on_meta``.

        The detector's attribute ``backbone`` is the ViT or a pyramid around it.

        Args:
            cfg: a copy, which may be changed.
            stock: use the engine's own ViT, if it has one.

        Raises:
            ConfigError: the engine cannot build the detector, or the planner does not know how it
                samples.
        """

    @abstractmethod
    def stride(self, model: Any) -> int:
        """The number of pixels that image sides are padded to a multiple of."""

    @abstractmethod
    def sample_in_full(self, model: Any, sizes: DefiniteSizes) -> None:
        """Set rules for the model's masks, so that every sampler takes as many as it may.

        The RPN and the ROI heads then sample as many anchors and boxes of each image as the config
        allows, spread evenly over the levels of the pyramid.
        """

    @abstractmethod
    def inputs(self, cfg: CfgNode, image_size: int, batch_size: int, boxes: Tensor) -> list[Any]:
        """The positional arguments that the training calls the model with.

        Args:
            cfg: the config that the model was built from.
            image_size: side of the square images, in pixels.
            batch_size: number of images.
            boxes: (n, 4) XYXY in pixels, the ground truth of each image; a real tensor.
        """

    def training(self) -> AbstractContextManager[object]:
        """The context that the training runs the model in."""
        return nullcontext()
