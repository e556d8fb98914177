"""One training iteration of a detector on fake tensors, with a label on every storage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from dr2net_d2.config import BACKBONE_SECTIONS
from dr2net_d2.core import reversible_stacks
from dr2net_d2.core.attention import Attention
from dr2net_d2.core.attention_kernels import planned_for
from dr2net_d2.core.checkpointed import checkpointed
from dr2net_d2.core.memory import LiveBytes, count_saved_bytes, peak_tensor_bytes, tensors_in
from dr2net_d2.plan.simulation import CudaAutocast, DefiniteSizes, differentiate, parameters_on_meta
from dr2net_d2.training import build_optimizer

ARMS = ("stock", "stock + checkpoint", "our attention + checkpoint", "dr2net")
"""The ViT as Detectron2 has it (the torchvision engine: ours with all logits at once, everything
stored); the same with one checkpoint per block; ours with one; ours, reversible. Swin and MViT have
Detectron2's attention in all of them."""

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
"""Activations are the ViT's: of the block under work, or all that is saved. Streams are what the
coupling handles, heads those of RPN and ROIs, other the images and the optimizer's temporaries."""

LASTING = PARTS[:3]

CHUNKS = 2
"""Of attention, on each axis, that are gone through: further ones of the hundreds that large images
have are the same again, and each costs time."""

aten = torch.ops.aten

# What a fake tensor takes for a GPU's fused attention, which torch's own table does not know.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}

ENGINES = {"detectron2": "dr2net_d2.plan.detectron2", "torchvision": "dr2net_d2.plan.torchvision"}


class DryRun:
    """A detector of an engine, with the ViT of an arm, without storage for anything.

    Args:
        cfg: of the engine.
        arm: of ``ARMS``.
        engine: of ``ENGINES``.

    Raises:
        ConfigError: the engine cannot build the detector.

    Attributes:
        stride: px that images are padded to whole multiples of.
    """

    def __init__(self, cfg: CfgNode, arm: str, engine: str) -> None:
        self._engine = importlib.import_module(ENGINES[engine])
        self._cfg = cfg = cfg.clone()
        cfg.defrost()
        # Images come in the size asked for; padding is to whole strides.
        for section in BACKBONE_SECTIONS:
            cfg.MODEL[section].SQUARE_PAD = 0
        cfg.MODEL.DR2NET.REVERSIBLE = True
        if stock := arm.startswith("stock"):
            cfg.MODEL.DR2NET.LEAN = []
        with parameters_on_meta():
            self._model = self._engine.build(cfg, stock and self._engine.STOCK_VIT)
        self.stride: int = self._engine.stride(self._model)
        backbone: Any = self._model.backbone
        # What is inside our pyramid, or Detectron2's; or the backbone is a ViT alone.
        inside = getattr(backbone, "bottom_up", backbone)
        self._vit: Any = getattr(backbone, "net", inside)
        _arrange(self._vit, arm)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes = DefiniteSizes()
        self._live = LiveBytes()
        with self._fake, self._sizes:
            self._model.train().to_empty(device="cpu")
            self._optimizer = build_optimizer(cfg, self._model)
            groups = self._optimizer.param_groups
            self._trained = [parameter for group in groups for parameter in group["params"]]
            for group in groups:
                group["foreach"] = True
            for parameter in self._trained:
                parameter.grad = torch.empty_like(parameter)
            self._optimizer.step()
        self._label(backbone)
        self._engine.sample_in_full(self._model, self._sizes)

    def set_coefficients(self, alpha: float, beta: float) -> None:
        """Of our backbone; a stock one has none."""
        with self._fake, self._sizes:
            for stack in reversible_stacks(self._vit):
                stack.coefficients.set(alpha, beta)

    def iterate(self, image_size: int, batch_size: int, objects: int) -> LiveBytes:
        """The storages of one iteration, under labels of ``PARTS``."""
        with self._on_gpu(), peak_tensor_bytes(LASTING) as live:
            self._live = live
            live.label = "other"
            live.assign(self._model.parameters(), "parameters")
            live.assign((p.grad for p in self._trained if p.grad is not None), "gradients")
            # Not the counts of steps, which are real tensors: torch keeps them on the host.
            state = tensors_in(list(self._optimizer.state.values()))
            live.assign((t for t in state if isinstance(t, FakeTensor)), "optimizer state")
            inputs = self._inputs(image_size, batch_size, objects)
            total = self._loss(inputs)
            if not self._engine.KEEPS_INPUTS:
                inputs.clear()
            self._optimizer.zero_grad()
            differentiate(total)
            live.label = "other"
            self._optimizer.step()
            return live

    def saved_bytes(self, image_size: int, batch_size: int, objects: int) -> int:
        """What autograd saves in the forward, parameters excluded."""
        with self._on_gpu(), count_saved_bytes(exclude=self._model.parameters()) as saved:
            self._loss(self._inputs(image_size, batch_size, objects))
        return saved.total

    def flops(self, image_size: int, objects: int) -> int:
        """Operations of an image's products in forward and backward; a multiply-add is two."""
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with self._on_gpu(chunks=None), counter:
            differentiate(self._loss(self._inputs(image_size, 1, objects)))
        return counter.get_total_flops()

    @contextmanager
    def _on_gpu(self, chunks: int | None = CHUNKS) -> Iterator[None]:
        with self._fake, self._sizes, CudaAutocast(), planned_for("cuda", chunks):
            yield

    def _inputs(self, image_size: int, batch_size: int, objects: int) -> list[Any]:
        # Real boxes on the diagonal, an eighth of the image wide: matching looks at values.
        starts = [7 / 8 * i / objects for i in range(objects)]
        boxes = torch.tensor([[a, a, a + 1 / 8, a + 1 / 8] for a in starts]) * image_size
        return self._engine.inputs(self._cfg, image_size, batch_size, boxes)

    def _loss(self, inputs: list[Any]) -> Tensor:
        amp = self._cfg.SOLVER.AMP.ENABLED
        with self._engine.training(), torch.autocast("cpu", torch.float16, enabled=amp):
            return sum(self._model(*inputs).values())

    def _label(self, backbone: nn.Module) -> None:
        """Let the label follow the forward through the detector, and the backward back."""

        def now(label: str, *_: Any) -> None:
            self._live.label = label

        def leaves(label: str, after: str, module: Any, inputs: Any, output: Any) -> None:
            self._live.label = after
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(now, label))

        def accumulated(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._live.assign([parameter.grad], "gradients")

        after = "heads"
        if self._vit is not backbone:
            backbone.register_forward_pre_hook(partial(now, "pyramid"))
            backbone.register_forward_hook(partial(leaves, "pyramid", after))
            after = "pyramid"
        self._vit.register_forward_pre_hook(partial(now, "activations"))
        self._vit.register_forward_hook(partial(leaves, "activations", after))
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(accumulated)


def _arrange(vit: Any, arm: str) -> None:
    """Give a backbone the arithmetic, the attention and the checkpoints of an arm."""
    with_checkpoints = arm.endswith("checkpoint")
    stacks = reversible_stacks(vit)
    if not stacks and with_checkpoints:
        # Swin has such lists in every stage.
        lists = [m for name, m in vit.named_modules() if name.rpartition(".")[2] == "blocks"]
        for block in chain.from_iterable(lists):
            block.forward = partial(_checkpoint, block.forward)
    for stack in stacks:
        stack.reversible = arm == "dr2net"
        if not stack.reversible:
            stack.arithmetic = "float"
        if with_checkpoints:
            vars(stack)["forward"] = partial(checkpointed, stack)
    if stacks and arm.startswith("stock"):
        for module in vit.modules():
            if isinstance(module, Attention):
                module.kernel = "matrix"


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
