"""What is compared: arms, each a few changes to parity.yaml, and the ablations of one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from dr2net_d2.core import CoefficientSchedule, Dr2NetViT, ReversibleSequence
from dr2net_d2.core.checkpointed import checkpointed
from dr2net_d2.core.stream_range import StreamRange
from projects.parity.photo_shapes import OUTLINES

Pairs = Callable[[float], tuple[float, float]]
"""progress in [0, 1] -> (alpha, beta)."""

LORA_RANK = 8
SECTIONS = ("MODEL.", "DATASETS.", "SOLVER.")

HALF = CoefficientSchedule(duration=0.5)
"""What the ablations vary: beta from 1/16 to 1/2 over the first half of training."""


@dataclass(frozen=True)
class Arm:
    """One way of finetuning the same pretrained ViT.

    Attributes:
        name: as in results.jsonl.
        label: as in tables and figures.
        keys: changes to parity.yaml; below MODEL.DR2NET unless one of ``SECTIONS`` stands before.
        backward: of ``dr2net_d2.fidelity.ARMS``, whose gradient error is followed; "" for none.
        equip: changes the ViT after the weights are loaded.
        schedule: in place of the one that ``keys`` describe, where the package has none like it.
        rate_of: the arm whose learning rate it takes over; "" tunes its own.
        engine: "torchvision", or "detectron2", which takes neither ``equip`` nor ``schedule``.
    """

    name: str
    label: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    backward: str = "exact"
    equip: Callable[[Dr2NetViT], object] | None = None
    schedule: Pairs | None = None
    rate_of: str = ""
    engine: str = "torchvision"

    def overrides(self) -> list[str]:
        """KEY VALUE words for the config."""
        words: list[str] = []
        for key, value in self.keys.items():
            full = key if key.startswith(SECTIONS) else f"MODEL.DR2NET.{key}"
            words += [full, str(value)]
        return words


class LowRank(nn.Module):
    """LoRA (Hu et al., arXiv 2106.09685): W + B A, B = 0 at first, A and B alone are trained."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.empty(rank, columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def freeze(vit: Dr2NetViT) -> None:
    vit.requires_grad_(False)


def add_low_rank(vit: Dr2NetViT) -> None:
    """Freeze the ViT, and give each linear layer of its blocks a trained low-rank part."""
    vit.requires_grad_(False)
    linears = [module for module in vit.blocks.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        register_parametrization(linear, "weight", LowRank(linear.weight, LORA_RANK))


def checkpoint_blocks(vit: Dr2NetViT) -> None:
    vars(vit.blocks)["forward"] = partial(checkpointed, vit.blocks)


def keep_first(count: int, vit: Dr2NetViT) -> None:
    """Leave out all blocks but the first, whose learning rates stay what they are."""
    blocks = [vit.blocks[i] for i in range(count)]
    vit.blocks = ReversibleSequence(blocks, vit.coefficients, vit.reversible, vit.arithmetic)


class FixedBits(StreamRange):
    """A range that gives k fractional bits, whatever the streams' peak."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def exponent(self, integer: torch.dtype) -> int:
        return self.k


def fix_bits(k: int, vit: Dr2NetViT) -> None:
    vit.blocks.stream_range = FixedBits(k)


def constant_pair(alpha: float, beta: float, progress: float) -> tuple[float, float]:
    return alpha, beta


def after_rest(rest: float, progress: float) -> tuple[float, float]:
    """Beta stays 0 for the first part of training, then ``HALF``, later by that."""
    if progress < rest:
        return 1.0, 0.0
    return HALF((progress - rest) / (1 - rest))


def cosine(progress: float) -> tuple[float, float]:
    """The ends and the duration of ``HALF``, slow at both ends."""
    moved = min(progress / HALF.duration, 1.0)
    return HALF(HALF.duration * (1 - math.cos(math.pi * moved)) / 2)


def _schedule(kind: str, **keys: float) -> dict[str, Any]:
    return {"SCHEDULE.KIND": kind} | {f"SCHEDULE.{k.upper()}": v for k, v in keys.items()}


def _static(beta: float) -> dict[str, Any]:
    return _schedule("constant", end_beta=beta)


FLOAT = {"ARITHMETIC": "float"}
STORED = {"REVERSIBLE": False, **FLOAT}
CONVENTIONAL = {**STORED, **_static(0.0)}
# As in the authors' point-cloud code: both halves start alike, their mean goes on. ALTERNATING is
# its version of October 2023; the newest, of December 2023, stops at (0.4, 0.7) and is not run yet.
AUTHORS = {"FIRST_STATE": "copy", "OUTPUT": "mean"}
ALTERNATING = {**AUTHORS, **_schedule("alternating", duration=0.5, updates=20)}
SCRATCH = {"MODEL.WEIGHTS": "''"}
CONVEX = _schedule("convex", duration=HALF.duration)

LITERATURE = partial(constant_pair, 1.0, 0.1)
# Exact arithmetic needs a beta on the grid.
ON_GRID = partial(constant_pair, 1.0, 1 / 8)

STATIC_HALF = Arm("static-1/2", "static β 1/2, exact", _static(1 / 2))

ARMS = (
    Arm("conventional", "conventional finetuning", CONVENTIONAL, "plain"),
    Arm(
        "checkpointing",
        "conventional, checkpointing",
        CONVENTIONAL,
        "checkpointing",
        checkpoint_blocks,
        rate_of="conventional",
    ),
    # A control: what the later half of the pretrained network is worth to a task.
    Arm(
        "first-6",
        "conventional, first 6 blocks",
        CONVENTIONAL,
        "plain",
        partial(keep_first, 6),
        rate_of="conventional",
    ),
    Arm("frozen", "frozen backbone", CONVENTIONAL, "", freeze),
    Arm("lora", f"LoRA, rank {LORA_RANK}", CONVENTIONAL, "", add_low_rank),
    Arm("hard-0.9", "hard conversion, β 0.9", {**FLOAT, **_static(0.9)}, "float reversible"),
    Arm("hard-1", "hard conversion, β 1", {**FLOAT, **_static(1.0)}, "float reversible"),
    Arm(
        "static-float",
        "static (1, 0.1), float",
        {**FLOAT, **AUTHORS},
        "float reversible",
        schedule=LITERATURE,
    ),
    # Each "all stored" is the same network as above it, with the gradient of plain autograd.
    Arm(
        "static-stored",
        "static (1, 0.1), all stored",
        {**STORED, **AUTHORS},
        "plain",
        schedule=LITERATURE,
    ),
    Arm("static-exact", "static (1, 0.125), exact", AUTHORS, schedule=ON_GRID),
    Arm(
        "static-exact-stored",
        "static (1, 0.125), all stored",
        {**STORED, **AUTHORS},
        "plain",
        schedule=ON_GRID,
        rate_of="static-exact",
    ),
    Arm("alternating-float", "alternating, float", {**FLOAT, **ALTERNATING}, "float reversible"),
    Arm("alternating", "alternating, exact", ALTERNATING),
    Arm("convex", "dynamic convex, exact (ours)", CONVEX),
    Arm("static-1/16", "static β 1/16, exact", _static(1 / 16)),
    Arm("static-1/8", "static β 1/8, exact", _static(1 / 8)),
    Arm("static-1/4", "static β 1/4, exact", _static(1 / 4)),
    STATIC_HALF,
    Arm("scratch", "conventional, from scratch", {**CONVENTIONAL, **SCRATCH}, "plain"),
    Arm("scratch-reversible", "reversible β 1/2, from scratch", {**_static(1 / 2), **SCRATCH}),
    Arm(
        "conventional-detectron2",
        "Detectron2's own ViTDet",
        {"MODEL.BACKBONE.NAME": "build_vitdet_backbone"},
        rate_of="conventional",
        engine="detectron2",
    ),
    Arm(
        "convex-detectron2",
        "dynamic convex, exact (ours), Detectron2",
        CONVEX,
        rate_of="convex",
        engine="detectron2",
    ),
)


def _variant(name: str, label: str, keys: Mapping[str, Any] | None = None, **others: Any) -> Arm:
    """A change to the convex arm, at its learning rate."""
    return Arm(f"convex/{name}", label, {**CONVEX, **(keys or {})}, rate_of="convex", **others)


ABLATIONS = {
    "end of the schedule (α, β)": [
        *(
            _variant(f"end-{b}", f"({1 - b / 16:.3g}, {b / 16:.3g})", {"SCHEDULE.END_BETA": b / 16})
            for b in (2, 4, 12, 14, 16)
        ),
    ],
    "length of the schedule": [
        STATIC_HALF,  # no length at all
        *(
            _variant(f"duration-{d}", f"β 1/2 after {100 * d:g} %", {"SCHEDULE.DURATION": d})
            for d in (0.05, 0.1, 0.25, 1.0)
        ),
    ],
    "shape of the schedule": [
        _variant("cosine", "cosine", schedule=cosine),
        # As an update per epoch makes of a training of 4 and of 20 epochs.
        _variant("two-stages", "two stages", {"SCHEDULE.UPDATES": 2}),
        _variant("ten-stages", "ten stages", {"SCHEDULE.UPDATES": 10}),
        _variant("rest-5%", "β 0 for the first 5 %", schedule=partial(after_rest, 0.05)),
        _variant("rest-10%", "β 0 for the first 10 %", schedule=partial(after_rest, 0.1)),
    ],
    "first state, output": [
        _variant("zero", "first state zero", {"FIRST_STATE": "zero"}),
        _variant("mean", "mean of the last two", {"OUTPUT": "mean"}),
    ],
    # Without a gradient error: its measurement chooses k itself.
    "fractional bits k": [
        _variant(f"k-{k}", f"k = {k}", backward="", equip=partial(fix_bits, k))
        for k in (12, 14, 16, 20, 23)
    ],
}
"""Heading -> variants of the convex arm, which itself is the row "default" under each."""

SHAPES_KEYS = {
    "DATASETS.TRAIN": "('photo_shapes_train',)",
    "DATASETS.TEST": "('photo_shapes_val',)",
    "MODEL.ROI_HEADS.NUM_CLASSES": len(OUTLINES),
}
SHAPES_ARMS = (
    "conventional",
    "first-6",
    "frozen",
    "lora",
    "hard-1",
    "static-float",
    "static-stored",
    "static-exact",
    "alternating",
    "convex",
    "convex/duration-0.1",
    "static-1/2",
    "scratch",
)
LONG_KEYS = {"SOLVER.MAX_ITER": 1600, "SOLVER.WARMUP_ITERS": 160}
LONG_ARMS = ("conventional", "hard-1", "static-float", "static-stored", "convex")

_DIGITS = {arm.name: arm for arm in (*ARMS, *chain.from_iterable(ABLATIONS.values()))}


def _task(prefix: str, names: tuple[str, ...], keys: Mapping[str, Any], tune: bool) -> list[Arm]:
    """Arms of the first task, with further keys; at their learning rates there, or tuned again."""
    return [
        replace(
            arm,
            name=f"{prefix}/{arm.name}",
            keys={**arm.keys, **keys},
            rate_of="" if tune else arm.rate_of or arm.name,
        )
        for arm in (_DIGITS[name] for name in names)
    ]


SHAPES = _task("shapes", SHAPES_ARMS, SHAPES_KEYS, tune=True)
"""The second task."""
LONG = _task("long", LONG_ARMS, LONG_KEYS, tune=False)
"""The first task with four times the iterations."""

EVERYTHING = _DIGITS | {arm.name: arm for arm in (*SHAPES, *LONG)}
"""Name -> arm or variant."""
