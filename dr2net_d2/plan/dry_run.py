"""One training iteration of a detector on fake tensors, with a label on every storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from dr2net_d2.config import BACKBONE_SECTIONS
from dr2net_d2.core import reversible_stacks
from dr2net_d2.core.attention_kernels import planned_for
from dr2net_d2.core.memory import LiveBytes, count_saved_bytes, peak_tensor_bytes, tensors_in
from dr2net_d2.plan.arms import Arm, arrange
from dr2net_d2.plan.engine import PlannedEngine
from dr2net_d2.plan.simulation import CudaAutocast, DefiniteSizes, differentiate, parameters_on_meta
from dr2net_d2.training import build_optimizer

PARTS = (
    "parameters",
    "gradients",
    "optimizer state",
    "streams",
    "remainder bits",
    "activations",
    "pyramid",
    "heads",
    "other",
)
"""The labels of storages. "streams" are what the coupling of the residual streams handles;
"activations" are the ViT's, either those of the block at work or all that are saved; "heads" are
RPN and ROI heads; "other" are the images and the optimizer's temporaries."""

LASTING = PARTS[:3]

CHUNKS = 2
"""Number of attention chunks that are run along each axis. Large images have hundreds; the others
would only repeat these, and each takes time."""

ENGINES = ("detectron2", "torchvision")

aten = torch.ops.aten

# Fake CPU tensors take this kernel where a GPU takes its own, and torch's table of FLOP formulas
# lacks it.
_ATTENTION_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def planned_engine(name: str) -> PlannedEngine:
    """The engine of a name in ``ENGINES``."""
    # Imported only now: Detectron2 need not be installed.
    if name == "detectron2":
        from dr2net_d2.plan.detectron2 import Detectron2Engine

        return Detectron2Engine()
    from dr2net_d2.plan.torchvision import TorchvisionEngine

    return TorchvisionEngine()


class DryRun:
    """An engine's detector and optimizer, without storage for anything.

    Args:
        cfg: a config of the engine.
        arm: how the backbone is computed.
        engine: a name in ``ENGINES``.

    Attributes:
        stride: image sides are padded to a multiple of it, in pixels.

    Raises:
        ConfigError: the engine cannot build the detector, or the planner does not know how it
            samples.
    """

    def __init__(self, cfg: CfgNode, arm: Arm, engine: str) -> None:
        self._cfg = _config_to_plan(cfg, arm)
        self._engine = planned_engine(engine)
        with parameters_on_meta():
            self._model = self._engine.build(self._cfg, arm.stock)
        self.stride = self._engine.stride(self._model)
        self._backbone: Any = self._model.backbone
        self._vit: Any = _inside_pyramid(self._backbone)
        arrange(self._vit, arm)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes = DefiniteSizes()
        self._engine.sample_in_full(self._model, self._sizes)
        self._prepare_training()
        self._live = LiveBytes()
        self._follow_labels()

    def _prepare_training(self) -> None:
        """Allocate parameters, gradients and optimizer state, as after a first iteration."""
        with self._fake, self._sizes:
            self._model.train().to_empty(device="cpu")
            self._optimizer = build_optimizer(self._cfg, self._model)
            groups = self._optimizer.param_groups
            self._trained = [parameter for group in groups for parameter in group["params"]]
            for group in groups:
                group["foreach"] = True
            for parameter in self._trained:
                parameter.grad = torch.empty_like(parameter)
            self._optimizer.step()

    def _follow_labels(self) -> None:
        """Let the label of new storages follow the forward through the detector, and the backward.

        The label changes where the forward enters and leaves the pyramid and the ViT, and where
        the backward comes back to them through their outputs.
        """

        def enter(label: str, *_: Any) -> None:
            self._live.label = label

        def leave(label: str, outer: str, module: Any, inputs: Any, output: Any) -> None:
            self._live.label = outer
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(enter, label))

        def accumulated(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._live.assign([parameter.grad], "gradients")

        outer = "heads"
        if self._vit is not self._backbone:
            self._backbone.register_forward_pre_hook(partial(enter, "pyramid"))
            self._backbone.register_forward_hook(partial(leave, "pyramid", outer))
            outer = "pyramid"
        self._vit.register_forward_pre_hook(partial(enter, "activations"))
        self._vit.register_forward_hook(partial(leave, "activations", outer))
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(accumulated)

    def set_coefficients(self, alpha: float, beta: float) -> None:
        """Set the coefficients of our backbone; a stock one has none."""
        with self._fake, self._sizes:
            for stack in reversible_stacks(self._vit):
                stack.coefficients.set(alpha, beta)

    def iterate(self, image_size: int, batch_size: int, objects: int) -> LiveBytes:
        """Run one iteration and follow its storages, under the labels of ``PARTS``.

        Args:
            image_size: side of the square images, in pixels.
            batch_size: number of images.
            objects: number of objects in each image.
        """
        with self._on_gpu(), peak_tensor_bytes(LASTING) as live:
            self._live = live
            live.label = "other"
            live.assign(self._model.parameters(), "parameters")
            live.assign((p.grad for p in self._trained if p.grad is not None), "gradients")
            # Step counts are real tensors, which torch keeps on the host.
            state = tensors_in(list(self._optimizer.state.values()))
            live.assign((t for t in state if isinstance(t, FakeTensor)), "optimizer state")
            inputs = self._inputs(image_size, batch_size, objects)
            total = self._loss(inputs)
            if not self._engine.keeps_inputs:
                inputs.clear()
            self._optimizer.zero_grad()
            differentiate(total)
            live.label = "other"
            self._optimizer.step()
            return live

    def saved_bytes(self, image_size: int, batch_size: int, objects: int) -> int:
        """Bytes that autograd saves in the forward, without parameters; see ``iterate``."""
        with self._on_gpu(), count_saved_bytes(exclude=self._model.parameters()) as saved:
            self._loss(self._inputs(image_size, batch_size, objects))
        return saved.total

    def flops(self, image_size: int, objects: int) -> int:
        """Floating-point operations of the matrix products and convolutions for one image.

        Forward and backward count; a multiply-add is two operations.
        """
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
        with self._on_gpu(chunks=None), counter:
            differentiate(self._loss(self._inputs(image_size, 1, objects)))
        return counter.get_total_flops()

    @contextmanager
    def _on_gpu(self, chunks: int | None = CHUNKS) -> Iterator[None]:
        with self._fake, self._sizes, CudaAutocast(), planned_for("cuda", chunks):
            yield

    def _inputs(self, image_size: int, batch_size: int, objects: int) -> list[Any]:
        # Boxes along the diagonal, an eighth of the image wide. They are real tensors, as matching
        # looks at their values.
        starts = [7 / 8 * i / objects for i in range(objects)]
        boxes = torch.tensor([[a, a, a + 1 / 8, a + 1 / 8] for a in starts]) * image_size
        return self._engine.inputs(self._cfg, image_size, batch_size, boxes)

    def _loss(self, inputs: list[Any]) -> Tensor:
        amp = self._cfg.SOLVER.AMP.ENABLED
        with self._engine.training(), torch.autocast("cpu", torch.float16, enabled=amp):
            return sum(self._model(*inputs).values())


def _config_to_plan(cfg: CfgNode, arm: Arm) -> CfgNode:
    """A copy of the config for an arm; its images are not padded to squares."""
    cfg = cfg.clone()
    cfg.defrost()
    for section in BACKBONE_SECTIONS:
        cfg.MODEL[section].SQUARE_PAD = 0
    cfg.MODEL.DR2NET.REVERSIBLE = True
    if arm.stock:
        cfg.MODEL.DR2NET.LEAN = []
    return cfg


def _inside_pyramid(backbone: Any) -> Any:
    """The ViT inside our pyramid or Detectron2's, or the backbone itself if it has no pyramid."""
    for name in ("net", "bottom_up"):
        if hasattr(backbone, name):
            return getattr(backbone, name)
    return backbone
