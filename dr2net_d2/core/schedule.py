"""How alpha and beta move during finetuning: progress in [0, 1] -> (alpha, beta). No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

BETA_GRID = 16
"""Exact arithmetic needs beta to be a multiple of 1 / BETA_GRID (see ``fixed_point``)."""

SCHEDULES = ("constant", "convex", "alternating")


def snap_to_grid(beta: float, grid: int = BETA_GRID) -> float:
    """Nearest multiple of ``1 / grid`` to beta; a positive beta never becomes 0."""
    snapped = round(beta * grid) / grid
    return 1 / grid if beta > 0 and snapped == 0 else snapped


@dataclass(frozen=True)
class CoefficientSchedule:
    """A stateless schedule ``schedule(progress) -> (alpha, beta)``.

    Kinds:
        * constant: (1 - end_beta, end_beta) from the first iteration, a hard conversion.
        * convex: beta rises linearly from ``start_beta`` to ``end_beta``, alpha = 1 - beta. With
            the first state copied this nearly keeps the pretrained function all the way.
        * alternating: the paper's dynamic strategy as its authors' point-cloud code has it: in
            ``updates`` equal stages alpha falls from 1 to 0 and beta rises from 0.1 to 1, one of
            the two per stage in turn, alpha first. ``start_beta`` and ``end_beta`` play no part.

    Args:
        kind: one of ``SCHEDULES``.
        start_beta, end_beta: in [0, 1].
        duration: the fraction of training, in (0, 1], after which the final values hold.
        updates: number of stages (often the epochs within ``duration``); 0 moves every iteration.
        exact: snap beta to multiples of 1/16, as exact arithmetic requires.

    Raises:
        ValueError: an argument out of range, with the value and what is allowed.
    """

    kind: str = "convex"
    start_beta: float = 1 / 16
    end_beta: float = 1 / 2
    duration: float = 0.5
    updates: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule kind {self.kind!r} is unknown; use one of {SCHEDULES}")
        for name in ("start_beta", "end_beta"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"schedule {name} is {value}; it must lie in [0, 1]")
        if not 0 < self.duration <= 1:
            raise ValueError(f"schedule duration is {self.duration}; it must lie in (0, 1]")
        if self.updates < 0 or (self.kind == "alternating" and self.updates < 2):
            raise ValueError(
                f"schedule updates is {self.updates}; it must be 0 (every iteration) or more, "
                "and at least 2 for the alternating kind"
            )

    def __call__(self, progress: float) -> tuple[float, float]:
        """The pair (alpha, beta) at ``progress``, the finished fraction of training in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}; it must lie in [0, 1]")
        moved = min(progress / self.duration, 1.0)
        if self.updates:
            moved = math.floor(moved * self.updates) / self.updates
        if self.kind == "alternating":
            return self._alternating(moved)
        start = self.end_beta if self.kind == "constant" else self.start_beta
        beta = self._snap(start + (self.end_beta - start) * moved)
        return 1 - beta, beta

    def _alternating(self, moved: float) -> tuple[float, float]:
        done = round(moved * self.updates)
        alpha = 1 - math.ceil(done / 2) / math.ceil(self.updates / 2)
        beta = min(math.floor(done / 2) / math.floor(self.updates / 2) + 0.1, 1.0)
        return alpha, self._snap(beta)

    def _snap(self, beta: float) -> float:
        return snap_to_grid(beta) if self.exact else beta
