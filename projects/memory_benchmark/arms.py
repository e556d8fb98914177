"""The networks that are compared, on the very same weights; their inputs; one training step."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from detectron2.modeling import build_backbone
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dr2net_d2 import commands
from dr2net_d2.core.checkpointed import checkpointed
from dr2net_d2.core.memory import LiveBytes, count_saved_bytes, peak_tensor_bytes
from dr2net_d2.d2 import build_detector
from projects.memory_benchmark.store import DEPTHS, LEAN_ARMS, Work

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-InstanceSegmentation"
BETA = 1 / 2
GLOBAL_BLOCKS = 4


class Shape(NamedTuple):
    """A plain ViT, and the shipped config that it is nearest to."""

    embed_dim: int
    num_heads: int
    config: str


MODELS = {
    "ti": Shape(192, 3, "b"),
    "s": Shape(384, 6, "b"),
    "b": Shape(768, 12, "b"),
    "l": Shape(1024, 16, "l"),
    "h": Shape(1280, 16, "h"),
}


def load_config(model: str, depth: int | None = None) -> CfgNode:
    """The shipped Mask R-CNN config of a model, for square images of any side, on a CPU.

    Args:
        model: of ``MODELS``.
        depth: number of blocks, at least 4, the last of each quarter global; None: the model's own.
    """
    shape = MODELS[model]
    file = CONFIGS / f"mask_rcnn_vitdet_{shape.config}.yaml"
    cfg = commands.load_config(str(file), [], "detectron2")
    depth = depth or DEPTHS[model]
    last_of_quarter = [quarter * depth // GLOBAL_BLOCKS - 1 for quarter in range(1, 5)]
    vit = cfg.MODEL.VIT
    vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS = shape.embed_dim, depth, shape.num_heads
    vit.WINDOW_BLOCK_INDEXES = [i for i in range(depth) if i not in last_of_quarter]
    vit.SQUARE_PAD = 0
    cfg.MODEL.DEVICE = "cpu"
    return cfg


class Network:
    """One arm: a network in training mode, and how to call it.

    Args:
        arm: of ``store.ARMS`` or ``store.LEAN_ARMS``.
        scope: of ``store.SCOPES``.
        module: the detector, or the ViT alone.
    """

    def __init__(self, arm: str, scope: str, module: nn.Module) -> None:
        self.arm, self.scope, self.module = arm, scope, module.train()

    @property
    def vit(self) -> Any:
        return self.module.get_submodule("" if self.scope == "vit" else "backbone.net")

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def equip(self) -> None:
        """Make the built network the arm that it is to be; again after a copy."""
        blocks = self.vit.blocks
        if self.arm == "stock-checkpoint":
            for block in blocks:
                forward = partial(type(block).forward, block)
                block.forward = partial(checkpoint, forward, use_reentrant=False)
        elif self.arm == "frozen":
            self.vit.requires_grad_(False)
        elif self.arm == "our-attention-checkpoint":
            # At its coefficients (1, 0), the ordinary network.
            blocks.forward = partial(checkpointed, blocks, preserve_rng_state=True)
        elif self.arm.startswith("dr2net"):
            self.vit.coefficients.set(1 - BETA, BETA)

    def __call__(self, inputs: Any) -> tuple[Tensor, int | None]:
        """The sum of the losses, or the ViT's features; and the number of foreground boxes."""
        with warnings.catch_warnings():
            # That floating-point inversion is wrong is known; its memory and time are the question.
            warnings.simplefilter("ignore", UserWarning)
            if self.scope == "vit":
                return self.module(inputs)["last_feat"], None
            with EventStorage() as storage:
                loss = sum(self.module(inputs).values())
            return loss, round(storage.latest()["roi_head/num_fg_samples"][0])


def build_networks(
    cfg: CfgNode, scope: str, arms: Sequence[str], device: torch.device, seed: int
) -> dict[str, Network]:
    """One network per arm; all parameters lie in the storages of the first one's."""
    torch.manual_seed(seed)
    networks: dict[str, Network] = {}
    for arm in arms:
        with _without_initialisation() if networks else ExitStack():
            module = build_module(cfg, scope, arm)
        if networks:
            share_parameters(module, next(iter(networks.values())).module)
        networks[arm] = Network(arm, scope, module.to(device))
        networks[arm].equip()
    return networks


def build_module(cfg: CfgNode, scope: str, arm: str) -> nn.Module:
    """The detector or the ViT of an arm, as the project's config keys describe it."""
    cfg = cfg.clone()
    reversible = arm.startswith("dr2net")
    ours = reversible or arm == "our-attention-checkpoint"
    part = "vit" if scope == "vit" else "vitdet"
    cfg.MODEL.BACKBONE.NAME = f"build_{'dr2net_' if ours else ''}{part}_backbone"
    cfg.MODEL.DR2NET.REVERSIBLE = reversible
    cfg.MODEL.DR2NET.ARITHMETIC = "exact" if reversible and arm != "dr2net-float" else "float"
    if arm in LEAN_ARMS:
        cfg.MODEL.DR2NET.LEAN = list(LEAN_ARMS[arm])
    return build_backbone(cfg) if scope == "vit" else build_detector(cfg)


def share_parameters(module: nn.Module, source: nn.Module) -> None:
    """Let the parameters of ``module`` lie in the storages of ``source``'s, name by name."""
    given = dict(source.named_parameters())
    own = [name for name, _ in module.named_parameters()]
    assert set(own) == set(given), set(own) ^ set(given)
    for name in own:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(given[name].detach()))


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Leave weights unset that are about to be replaced; in a ViT-H drawing them takes long."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def make_inputs(work: Work, embed_dim: int, device: torch.device) -> tuple[Any, Tensor | None]:
    """Made-up images with ground truth, and what the backward starts from.

    Returns:
        detector: (what Detectron2's mapper gives, None).
        vit: (normalised images (N, 3, side, side), a random (N, C, side / 16, side / 16)).
    """
    if work.scope == "vit":
        generator = torch.Generator().manual_seed(work.seed)
        shapes = (
            (work.batch, 3, work.size, work.size),
            (work.batch, embed_dim, work.size // 16, work.size // 16),
        )
        images, gradient = (torch.randn(s, generator=generator).to(device) for s in shapes)
        return images, gradient
    rng = np.random.default_rng(work.seed)
    return [_image(work.size, work.objects, rng) for _ in range(work.batch)], None


def _image(side: int, objects: int, rng: np.random.Generator) -> dict[str, Any]:
    """Noise with ``objects`` ellipses, their axes from 16 px to a quarter of the image."""
    axes = 16 * (side / 64) ** rng.random((objects, 2))
    corners = rng.random((objects, 2)) * (side - axes)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    outlines = corners[:, None] + axes[:, None] * (1 + circle) / 2
    boxes = np.concatenate([corners, corners + axes], 1)
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
    instances.gt_classes = torch.from_numpy(rng.integers(0, 80, objects))
    instances.gt_masks = PolygonMasks([[outline.ravel()] for outline in outlines])
    pixels = torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8))
    return {"image": pixels, "instances": instances, "height": side, "width": side}


class Step(NamedTuple):
    """Times of one forward and backward, and what the forward gave."""

    forward_seconds: float
    backward_seconds: float
    output: Tensor
    foreground: int | None


def take_step(network: Network, inputs: Any, gradient: Tensor | None, work: Work) -> Step:
    """Forward and backward, from the same random state each time; gradients must be there."""
    on_gpu = network.device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    started = time.perf_counter()
    output, foreground = _forward(network, inputs, work)
    wait()
    middle = time.perf_counter()
    output.backward(gradient)
    wait()
    ended = time.perf_counter()
    return Step(middle - started, ended - middle, output.detach(), foreground)


def _forward(network: Network, inputs: Any, work: Work) -> tuple[Tensor, int | None]:
    torch.manual_seed(work.seed)
    with torch.autocast(network.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
        return network(inputs)


def measure_memory(
    network: Network, inputs: Any, gradient: Tensor | None, work: Work
) -> dict[str, Any]:
    """Bytes saved for the backward, and the peak beyond weights, gradients and images.

    On a GPU what its allocator saw, also with weights and gradients (``total_bytes``); on a CPU
    the sum of the tensors that live, without what kernels use inside.
    """
    device = network.device
    with gradients(network):
        if device.type == "cuda":  # libraries allocate their workspaces in the first step
            take_step(network, inputs, gradient, work)
        with count_saved_bytes(exclude=network.module.parameters()) as saved:
            _forward(network, inputs, work)
        with _peak(device) as live:
            step = take_step(network, inputs, gradient, work)
        weights = sum(parameter.nbytes for parameter in network.module.parameters())
        gradient_bytes = sum(parameter.nbytes for parameter in network.trained)
        total = weights + gradient_bytes + live.peak
        if device.type == "cuda":
            total = torch.cuda.max_memory_allocated(device)
    output = float(step.output.double().mean())
    return {
        "saved_bytes": saved.total,
        "peak_bytes": live.peak,
        "weight_bytes": weights,
        "gradient_bytes": gradient_bytes,
        "total_bytes": total,
        "output": output if math.isfinite(output) else None,
        "foreground": step.foreground,
    }


@contextmanager
def _peak(device: torch.device) -> Iterator[LiveBytes]:
    if device.type != "cuda":
        with peak_tensor_bytes() as live:
            yield live
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, live = torch.cuda.memory_allocated(device), LiveBytes()
    yield live
    torch.cuda.synchronize(device)
    live.peak = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def gradients(network: Network) -> Iterator[None]:
    """Gradients of zero, allocated before anything is measured and freed after it."""
    try:
        for parameter in network.trained:
            parameter.grad = torch.zeros_like(parameter)
        yield
    finally:
        for parameter in network.trained:
            parameter.grad = None


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
