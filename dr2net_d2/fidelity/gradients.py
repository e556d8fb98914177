"""Gradients of a ViT, computed in four ways: their errors, the bytes they save, their peak."""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from dr2net_d2.core import Dr2NetViT, Schedule
from dr2net_d2.core.checkpointed import checkpointed
from dr2net_d2.core.memory import (
    LiveBytes,
    available_memory_bytes,
    count_saved_bytes,
    peak_tensor_bytes,
)
from dr2net_d2.core.replay import has_values
from dr2net_d2.core.stream_range import StreamRange
from dr2net_d2.training import passed_pairs

logger = logging.getLogger(__name__)

ARMS = ("exact", "float reversible", "checkpointing", "plain")
"""Reversible in fixed point, reversible in floating point, one checkpoint per block, and everything
stored."""

PLAIN = "plain"


@dataclass(frozen=True)
class Reference:
    """The dtype of the reference gradients, which store everything, and why it was chosen."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Measurement(TypedDict):
    """One row of fidelity.json.

    gradient_error is relative to the reference, and None if it is not finite; the bytes exclude the
    weights and their gradients.
    """

    alpha: float
    beta: float
    arm: str
    gradient_error: float | None
    saved_bytes: int
    peak_bytes: int


def schedule_pairs(
    schedule: Schedule, iterations: int, maximum: int = 9
) -> list[tuple[float, float]]:
    """The distinct (alpha, beta) of a training, in order.

    Args:
        schedule: the training's coefficients.
        iterations: length of the training.
        maximum: more pairs than this are thinned out evenly, keeping the first and the last.

    Raises:
        ConfigError: the schedule cannot be used, or has one pair per function.
    """
    pairs = passed_pairs(schedule, iterations)
    chosen = np.linspace(0, len(pairs) - 1, min(maximum, len(pairs))).round().astype(int)
    return [pairs[i] for i in chosen]


def choose_reference(vit: Dr2NetViT, image: Tensor) -> Reference:
    """float64 if it fits into the free memory of the image's device, else float32.

    Raises:
        MemoryError: not even float32 fits.
    """
    weights = sum(parameter.nbytes for parameter in vit.parameters())
    peak = plain_peak_bytes(vit, image)
    free = available_memory_bytes(image.device)
    # The reference is a copy of the model with gradients and stored activations; the model itself
    # has gradients as well.
    double, single = (size * (2 * weights + peak) + weights for size in (2, 1))
    memory = f"{free / 1e9:.1f} GB are free"
    if double < 0.9 * free:
        return Reference(torch.float64, f"float64, which takes {double / 1e9:.1f} GB; {memory}")
    if single < 0.9 * free:
        reason = f"float32, as float64 would take {double / 1e9:.1f} GB and {memory}"
        return Reference(torch.float32, reason)
    raise MemoryError(f"reference gradients take {single / 1e9:.1f} GB, but {memory}")


def plain_peak_bytes(vit: Dr2NetViT, image: Tensor) -> int:
    """Peak of forward and backward with all activations stored, counted on fake tensors."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        vit, image = copy.deepcopy(vit), copy.deepcopy(image)
    with mode:
        projection = torch.empty(_feature_shape(vit, image), device=image.device)
        return differentiate(vit, image, projection, PLAIN, 0.5, 0.5).peak_bytes


def measure(
    vit: Dr2NetViT,
    image: Tensor,
    alpha: float,
    beta: float,
    *,
    reference: torch.dtype = torch.float64,
    seed: int = 0,
    arms: Sequence[str] = ARMS,
) -> list[Measurement]:
    """Differentiate a random projection of the features in every way, at one pair of coefficients.

    Args:
        vit: float32, in evaluation mode; its coefficients and arithmetic are left changed.
        image: (1, channels, H, W), float32.
        alpha, beta: the coefficients; beta must lie on the grid of exact arithmetic.
        reference: dtype of the gradients to compare with.
        seed: seed of the projection.
        arms: the ways to measure, from ``ARMS``.

    Returns:
        One row for each arm.
    """
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(_feature_shape(vit, image), generator=generator).to(image.device)
    oracle = copy.deepcopy(vit).to(reference)
    expected = differentiate(
        oracle, image.to(reference), projection.to(reference), PLAIN, alpha, beta
    ).gradients
    del oracle
    rows = []
    for arm in arms:
        result = differentiate(vit, image, projection, arm, alpha, beta)
        error = relative_error(result.gradients, expected)
        rows.append(
            Measurement(
                alpha=alpha,
                beta=beta,
                arm=arm,
                gradient_error=error if math.isfinite(error) else None,
                saved_bytes=result.saved_bytes,
                peak_bytes=result.peak_bytes,
            )
        )
    vit.zero_grad()
    return rows


def measure_all(
    vit: Dr2NetViT,
    image: Tensor,
    pairs: Sequence[tuple[float, float]],
    *,
    reference: torch.dtype,
    seed: int,
) -> list[Measurement]:
    """``measure`` at every pair of coefficients; logs a line of progress after each."""
    rows: list[Measurement] = []
    started = time.perf_counter()
    for done, (alpha, beta) in enumerate(pairs, 1):
        new = measure(vit, image, alpha, beta, reference=reference, seed=seed)
        rows += new
        left = (time.perf_counter() - started) / done * (len(pairs) - done)
        logger.info(
            "coefficients %d of %d, %s left: α %.3f, β %.3f, gradient error: %s",
            done,
            len(pairs),
            timedelta(seconds=round(left)),
            alpha,
            beta,
            ", ".join(f"{row['arm']} {format_error(row['gradient_error'])}" for row in new),
        )
    return rows


def format_error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


@dataclass(frozen=True)
class Gradients:
    """The gradients of the image and of all parameters, and what computing them took."""

    gradients: list[Tensor]
    saved_bytes: int
    peak_bytes: int


def differentiate(
    vit: Dr2NetViT, image: Tensor, projection: Tensor, arm: str, alpha: float, beta: float
) -> Gradients:
    """Gradients of ``(features * projection).sum()``, which are left in ``.grad`` as well."""
    image = image.detach().requires_grad_()
    leaves = [image, *vit.parameters()]
    for leaf in leaves:
        # Allocated now, so that the peak does not include them.
        leaf.grad = torch.zeros_like(leaf)
    # A row must not depend on the rows before it.
    vit.blocks.stream_range = StreamRange().to(image.device)
    with _peak(image) as live:
        with count_saved_bytes(exclude=vit.parameters()) as saved:
            features = forward(vit, image, arm, alpha, beta)
        features.backward(projection)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return Gradients(gradients, saved.total, live.peak)


def forward(vit: Dr2NetViT, image: Tensor, arm: str, alpha: float, beta: float) -> Tensor:
    """The features (N, C, H, W) as an arm of ``ARMS`` computes them."""
    vit.arithmetic = "exact" if arm == "exact" else "float"
    vit.reversible = arm in ("exact", "float reversible")
    vit.coefficients.set(alpha, beta)
    checkpoints = _checkpoints(vit.blocks) if arm == "checkpointing" else nullcontext()
    with checkpoints, warnings.catch_warnings():
        # The error of floating-point inversion is what is being measured.
        warnings.simplefilter("ignore", UserWarning)
        return vit(image)[vit.out_feature]


def relative_error(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the reference."""
    difference = norm = 0.0
    for gradient, expected in zip(gradients, reference, strict=True):
        expected = expected.double()
        difference += float((gradient.double() - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(difference / norm)


def _feature_shape(vit: Dr2NetViT, image: Tensor) -> tuple[int, ...]:
    height, width = image.shape[-2:]
    return (len(image), vit.embed_dim, height // vit.patch_size, width // vit.patch_size)


@contextmanager
def _checkpoints(stack: Any) -> Iterator[None]:
    """Compute a stack with one of torch's checkpoints per block."""
    stack.forward = partial(checkpointed, stack)
    try:
        yield
    finally:
        del stack.forward  # the class's own again


@contextmanager
def _peak(image: Tensor) -> Iterator[LiveBytes]:
    """Peak bytes on the image's device, beyond those allocated at the start."""
    device = image.device
    if device.type != "cuda" or not has_values(image):
        with peak_tensor_bytes() as live:
            yield live
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    live = LiveBytes()
    yield live
    torch.cuda.synchronize(device)
    live.peak = torch.cuda.max_memory_allocated(device) - before
