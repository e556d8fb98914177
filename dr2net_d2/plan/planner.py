"""How much memory will a training take? Counted on fake tensors: no GPU, nothing allocated.

One iteration of the detector that the engine would train is run in the engine's order: forward,
while the gradients of the last iteration are still there, backward, clipping, optimizer step. Every
storage is followed from its creation to its end, under a label for what created it.
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
from dr2net_d2.core.schedule import BETA_GRID
from dr2net_d2.core.stream_range import bits_for_growth
from dr2net_d2.errors import ConfigError
from dr2net_d2.plan.arms import ARMS
from dr2net_d2.plan.dry_run import ENGINES, PARTS, DryRun
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
        arm: a name in ``ARMS``.
        image_size: side of the square images, in pixels.
        batch_size: images on the GPU.
        alpha, beta: the coefficients; (1, 0), the plain network, for all arms but "dr2net".
        peak: the highest sum of everything.
        parts: what the peak consists of, by the labels of ``PARTS``.
        saved: by autograd for the backward, in the whole detector, without parameters.
        beyond: the peak without parameters, gradients and optimizer state.
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
    *,
    objects: int = 20,
    coefficients: tuple[float, float] | None = None,
    engine: str = "detectron2",
) -> Prediction:
    """Predict the memory of one iteration of a config's detector.

    It holds under the assumptions of ``ASSUMED``, and does not include ``NOT_INCLUDED``.

    Args:
        cfg: a config of the engine; for torchvision, one that ``check_config`` has passed.
            MODEL.VIT.SQUARE_PAD is ignored: images are padded to a multiple of the stride.
        arm: a name in ``ARMS``, which decides on the backbone and MODEL.DR2NET.REVERSIBLE.
        image_size: side of the square images, in pixels.
        batch_size: images on this GPU; SOLVER.IMS_PER_BATCH is ignored.
        objects: number of objects in each image.
        coefficients: (alpha, beta); by default the pair of the schedule that takes the most memory.
        engine: "detectron2" or "torchvision".

    Raises:
        ConfigError: a number below 1, an unknown arm or engine, or a config that the engine cannot
            build or the planner does not know.
    """
    planner = Planner(cfg, arm, objects=objects, engine=engine)
    return planner.predict(image_size, batch_size, coefficients)


class Planner:
    """Predictions for one detector, which is built once.

    Args:
        cfg, arm, objects, engine: see ``predict``.

    Attributes:
        stride: image sides are padded to a multiple of it, in pixels.
        side_step: the step of a search over image sides, in pixels: the least common multiple of
            the stride and 64.

    Raises:
        ConfigError: see ``predict``.
    """

    def __init__(
        self, cfg: CfgNode, arm: str, *, objects: int = 20, engine: str = "detectron2"
    ) -> None:
        for name, value, known in (("arm", arm, tuple(ARMS)), ("engine", engine, ENGINES)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; use one of {known}")
        _check_positive("number of objects", objects)
        self.arm = arm
        self.objects = objects
        self._cfg = cfg
        self._run = DryRun(cfg, ARMS[arm], engine)
        self.stride = self._run.stride
        self.side_step = math.lcm(64, self.stride)

    def predict(
        self,
        image_size: int,
        batch_size: int = 1,
        coefficients: tuple[float, float] | None = None,
    ) -> Prediction:
        """Predict one iteration; see the function ``predict``.

        Raises:
            ConfigError: a number below 1.
        """
        _check_positive("image size", image_size)
        _check_positive("batch size", batch_size)
        alpha, beta = self._set(coefficients)
        live = self._run.iterate(image_size, batch_size, self.objects)
        parts = {part: live.peak_parts.get(part, 0) for part in PARTS}
        assert sum(parts.values()) == live.peak, live.peak_parts
        return Prediction(
            arm=self.arm,
            image_size=image_size,
            batch_size=batch_size,
            alpha=alpha,
            beta=beta,
            peak=live.peak,
            parts=parts,
            saved=self._run.saved_bytes(image_size, batch_size, self.objects),
            beyond=live.beyond,
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
        """Floating-point operations for one image, recomputation in the backward included.

        Matrix products and convolutions count. Every chunk of attention is run, which takes minutes
        for images of 2000 px.
        """
        self._set(None)
        return self._run.flops(image_size, self.objects)

    @cached_property
    def _costliest(self) -> tuple[float, float]:
        return costliest(self._cfg)

    def _set(self, coefficients: tuple[float, float] | None) -> tuple[float, float]:
        pair = (1.0, 0.0)
        if ARMS[self.arm].reversible:
            pair = coefficients or self._costliest
        self._run.set_coefficients(*pair)
        return pair


def largest_fitting(
    peak: Callable[[int], int], budget: int, *, maximum: int, power: int = 1, first: int = 1
) -> int:
    """The largest n from 1 to ``maximum`` with peak(n) <= budget; 0 if there is none.

    Both that n and n + 1 are evaluated, so the answer does not rest on interpolation. Where to
    evaluate follows from a line through the two points nearest to the budget; for
    ``peak(n) = a + b * n ** power`` that takes about four evaluations.

    Args:
        peak: bytes, must not fall with n.
        budget: bytes.
        maximum: where the search stops.
        power: the power of n that the peak is about linear in.
        first: the n to evaluate first.
    """
    fitting, excess = 0, maximum + 1
    peaks: dict[int, int] = {}
    guess = min(first, maximum)
    for evaluation in range(1, 2 + 2 * maximum):
        if excess - fitting == 1:
            break
        peaks[guess] = peak(guess)
        if peaks[guess] <= budget:
            fitting = guess
        else:
            excess = guess
        nearest = sorted(peaks, key=lambda n: abs(peaks[n] - budget))[:2]
        guess = (fitting + excess) // 2
        if len(nearest) == 1:
            guess = nearest[0] + 1 if fitting else nearest[0] // 2
        elif (evaluation < 4 or evaluation % 2) and (rise := peaks[nearest[0]] - peaks[nearest[1]]):
            run = nearest[0] ** power - nearest[1] ** power
            target = nearest[0] ** power + (budget - peaks[nearest[0]]) * (run / rise)
            guess = int(max(target, 0) ** (1 / power))
        guess = min(max(guess, fitting + 1), excess - 1)
    return fitting


def pairs_of_schedule(cfg: CfgNode) -> list[tuple[float, float]]:
    """The (alpha, beta) of a config's schedule: for each beta, the pair with the largest alpha.

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
    """Side of the square images that a config trains on, in pixels.

    It is the crop of INPUT.LSJ if that is enabled, else the largest size that the tiles of
    INPUT.TILES are resized to, else MODEL.VIT.IMG_SIZE.
    """
    data = cfg.INPUT
    if data.LSJ.ENABLED:
        return data.LSJ.IMAGE_SIZE
    if not data.TILES.ENABLED:
        return cfg.MODEL.VIT.IMG_SIZE
    shortest = max(data.MIN_SIZE_TRAIN)
    return min(shortest, data.MAX_SIZE_TRAIN) if shortest else data.TILES.SIZE


def costliest(cfg: CfgNode) -> tuple[float, float]:
    """The pair of the schedule that takes the most memory: it keeps the most bits for the inverse.

    The first of several such pairs.
    """
    steps = 2 * cfg.MODEL.VIT.DEPTH
    exact = cfg.MODEL.DR2NET.ARITHMETIC == "exact"

    def bits(pair: tuple[float, float]) -> int:
        alpha, beta = pair
        if beta == 0:
            return 32 * steps
        if not exact:
            return 0
        # Each step keeps the bits of beta's denominator, and those that the scale changes by
        # between its oldest and its newest stream.
        k = bits_for_growth([stream_growth(alpha, beta)] * steps)
        remainder = Fraction(beta).denominator.bit_length() - 1
        return remainder * steps + sum(k[max(i - 2, 0)] - k[i] for i in range(1, steps + 1))

    return max(pairs_of_schedule(cfg), key=bits)


def _check_positive(name: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"the {name} is {number}; it must be at least 1")
