"""How much memory will a training take? Counted on fake tensors: no GPU, nothing allocated.

One iteration of the detector that the engine would train is run in the engine's order: forward with
the gradients of the last iteration still there, backward, clipping, optimizer step. Every storage
is followed from its creation to its end, under the part of the detector that created it.

``plan`` is the command on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from fvcore.common.config import CfgNode

from dr2net_d2.config import coefficient_schedule
from dr2net_d2.core.coupling import stream_growth
from dr2net_d2.core.fixed_point import extra_bits
from dr2net_d2.core.schedule import BETA_GRID
from dr2net_d2.errors import ConfigError
from dr2net_d2.plan.dry_run import ARMS, ENGINES, PARTS, DryRun
from dr2net_d2.training import passed_pairs

ASSUMED = (
    "one GPU; square images; as many sampled anchors and boxes as the config allows, spread evenly "
    "over the levels; half precision by autocast if SOLVER.AMP.ENABLED; torch's foreach optimizers"
)
NOT_INCLUDED = (
    "the CUDA context, workspaces of cuDNN and cuBLAS, rounding and fragmentation in the "
    "allocator, gradient buckets of DistributedDataParallel"
)


@dataclass(frozen=True)
class Prediction:
    """Memory of one training iteration, in bytes.

    Attributes:
        arm: of ``ARMS``.
        image_size: side of the square images in px.
        batch_size: images on the GPU.
        alpha, beta: the coefficients; (1, 0), the plain network, for arms without.
        peak: everything.
        parts: of ``PARTS``, at the peak; they sum to it.
        saved: by autograd for the backward, in the whole detector, without parameters.
        beyond: the peak of all but parameters, gradients and optimizer state.
    """

    arm: str
    image_size: int
    batch_size: int
    alpha: float
    beta: float
    peak: int
    parts: dict[str, int]
    saved: int
    beyond: int


def predict(
    cfg: CfgNode,
    arm: str,
    image_size: int,
    batch_size: int = 1,
    objects: int = 20,
    coefficients: tuple[float, float] | None = None,
    engine: str = "detectron2",
) -> Prediction:
    """The memory of one iteration of the detector of a config.

    Assumed are ``ASSUMED``; ``NOT_INCLUDED`` comes on top.

    Args:
        cfg: of the engine; checked, for torchvision's. Images are padded to whole strides, whatever
            its MODEL.VIT.SQUARE_PAD.
        arm: of ``ARMS``; the config's choice of backbone and MODEL.DR2NET.REVERSIBLE do not count.
        image_size: px.
        batch_size: images on this GPU, whatever SOLVER.IMS_PER_BATCH.
        objects: in each image.
        coefficients: (alpha, beta); by default those of the schedule that take the most memory.
        engine: "detectron2" or "torchvision".

    Raises:
        ConfigError: a config that the engine cannot build, numbers below 1.
    """
    return Planner(cfg, arm, objects, engine).predict(image_size, batch_size, coefficients)


class Planner:
    """Predictions for one detector, which is built once.

    Args:
        cfg, arm, objects, engine: see ``predict``.

    Attributes:
        stride: px that images are padded to whole multiples of.
        side_step: px, the multiples in which sides are searched: of the stride and of 64.
    """

    def __init__(
        self, cfg: CfgNode, arm: str, objects: int = 20, engine: str = "detectron2"
    ) -> None:
        for name, value, known in (("arm", arm, ARMS), ("engine", engine, tuple(ENGINES))):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; use one of {known}")
        _at_least_one("objects", objects)
        self.arm = arm
        self.objects = objects
        self._cfg = cfg
        self._run = DryRun(cfg, arm, engine)
        self.stride = self._run.stride
        self.side_step = math.lcm(64, self.stride)

    def predict(
        self,
        image_size: int,
        batch_size: int = 1,
        coefficients: tuple[float, float] | None = None,
    ) -> Prediction:
        _at_least_one("image size", image_size)
        _at_least_one("batch size", batch_size)
        alpha, beta = self._set(coefficients)
        live = self._run.iterate(image_size, batch_size, self.objects)
        parts = {part: live.peak_parts.get(part, 0) for part in PARTS}
        assert sum(parts.values()) == live.peak, live.peak_parts
        saved = self._run.saved_bytes(image_size, batch_size, self.objects)
        return Prediction(
            self.arm, image_size, batch_size, alpha, beta, live.peak, parts, saved, live.beyond
        )

    def peak(
        self,
        image_size: int,
        batch_size: int = 1,
        coefficients: tuple[float, float] | None = None,
    ) -> int:
        """``predict(...).peak`` alone, which is faster."""
        self._set(coefficients)
        return self._run.iterate(image_size, batch_size, self.objects).peak

    def flops(self, image_size: int) -> int:
        """Floating-point operations of an image's products, recomputation in the backward included.

        Every chunk of attention is gone through, which takes minutes for images of 2000 px.
        """
        self._set(None)
        return self._run.flops(image_size, self.objects)

    @cached_property
    def _costliest(self) -> tuple[float, float]:
        return costliest(self._cfg)

    def _set(self, coefficients: tuple[float, float] | None) -> tuple[float, float]:
        pair = (1.0, 0.0) if self.arm != "dr2net" else coefficients or self._costliest
        self._run.set_coefficients(*pair)
        return pair


def largest_fitting(
    peak: Callable[[int], int], budget: int, most: int, power: int = 1, known: int = 1
) -> int:
    """The largest n from 1 to ``most`` with peak(n) <= budget; 0 if there is none.

    Both that n and n + 1 have been looked at. Where to look follows from a line through the
    nearest known points, which for ``peak(n) = a + b * n ** power`` takes four looks.

    Args:
        peak: does not fall with n.
        budget: bytes.
        most: where to stop.
        power: of n that peak is about linear in.
        known: an n whose peak is cheap, to begin with.
    """
    fitting, excess = 0, most + 1
    seen: dict[int, int] = {}
    guess = min(known, most)
    for look in range(1, 2 + 2 * most):
        if excess - fitting == 1:
            break
        seen[guess] = peak(guess)
        if seen[guess] <= budget:
            fitting = guess
        else:
            excess = guess
        points = sorted(seen, key=lambda n: abs(seen[n] - budget))[:2]
        guess = (fitting + excess) // 2
        if len(points) == 1:
            guess = points[0] + 1 if fitting else points[0] // 2
        elif (look < 4 or look % 2) and (slope := seen[points[0]] - seen[points[1]]):
            steepness = (points[0] ** power - points[1] ** power) / slope
            target = points[0] ** power + (budget - seen[points[0]]) * steepness
            guess = int(max(target, 0) ** (1 / power))
        guess = min(max(guess, fitting + 1), excess - 1)
    return fitting


def pairs_of_schedule(cfg: CfgNode) -> list[tuple[float, float]]:
    """The (alpha, beta) that a training passes, one for each beta: that of the largest alpha.

    Memory depends on alpha only where alpha + beta > 1 lets the streams grow.

    Raises:
        ConfigError: a schedule that cannot be used, or one with a pair for each function.
    """
    grid = BETA_GRID if cfg.MODEL.DR2NET.ARITHMETIC == "exact" else None
    largest: dict[float, float] = {}
    for alpha, beta in passed_pairs(coefficient_schedule(cfg), cfg.SOLVER.MAX_ITER, grid):
        largest[beta] = max(alpha, largest.get(beta, 0.0))
    return [(alpha, beta) for beta, alpha in largest.items()]


def training_side(cfg: CfgNode) -> int:
    """Side in px of the square images that a training goes through.

    INPUT.LSJ's crop; with INPUT.TILES what its tiles are at most resized to; MODEL.VIT.IMG_SIZE.
    """
    data = cfg.INPUT
    if data.LSJ.ENABLED:
        return data.LSJ.IMAGE_SIZE
    if not data.TILES.ENABLED:
        return cfg.MODEL.VIT.IMG_SIZE
    shortest = max(data.MIN_SIZE_TRAIN)
    return min(shortest, data.MAX_SIZE_TRAIN) if shortest else data.TILES.SIZE


def costliest(cfg: CfgNode) -> tuple[float, float]:
    """The pair of the schedule that keeps the most bits for the inverse; the first such one."""
    steps = 2 * cfg.MODEL.VIT.DEPTH
    exact = cfg.MODEL.DR2NET.ARITHMETIC == "exact"

    def bits(pair: tuple[float, float]) -> int:
        alpha, beta = pair
        if beta == 0:
            return 32 * steps
        if not exact:
            return 0
        # Each step keeps its share of beta's, and what the scales of its ends differ by.
        k = extra_bits([stream_growth(alpha, beta)] * steps)
        shares = Fraction(beta).denominator.bit_length() - 1
        return shares * steps + sum(k[max(i - 2, 0)] - k[i] for i in range(1, steps + 1))

    return max(pairs_of_schedule(cfg), key=bits)


def _at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"the {name} is {number}; it must be at least 1")
