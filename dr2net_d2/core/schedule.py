"""How alpha and beta move during finetuning: progress in [0, 1] -> (alpha, beta). No torch here.

A kind of schedule is a small class with its own parameters. It says which pair belongs to
``moved``, the finished fraction of the way from the first pair to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

BETA_GRID = 16
"""Exact arithmetic needs beta to be a multiple of 1 / BETA_GRID (see ``fixed_point``)."""

Values = float | Sequence[float]
"""One value for all residual functions of a network, or one for each."""

Schedule = Callable[[float], tuple[Values, Values]]
"""progress in [0, 1] -> (alpha, beta)."""

Snap = Callable[[float], float]


def snap_to_grid(beta: float, grid: int = BETA_GRID) -> float:
    """Nearest multiple of ``1 / grid`` to beta; a positive beta never becomes 0."""
    snapped = round(beta * grid) / grid
    return 1 / grid if beta > 0 and snapped == 0 else snapped


class Kind(Protocol):
    """A kind of schedule; its fields are arguments of ``CoefficientSchedule``."""

    def __call__(self, moved: float, snap: Snap = float) -> tuple[float, float]:
        """(alpha, beta) at ``moved`` in [0, 1], with ``snap`` applied to beta."""


@dataclass(frozen=True)
class Constant:
    """(1 - end_beta, end_beta) from the first iteration: a hard conversion."""

    end_beta: float

    def __call__(self, moved: float, snap: Snap = float) -> tuple[float, float]:
        beta = snap(self.end_beta)
        return 1 - beta, beta


@dataclass(frozen=True)
class Convex:
    """Beta moves linearly from ``start_beta`` to ``end_beta``, and alpha = 1 - beta.

    With a copied first state this nearly keeps the pretrained function all the way.
    """

    start_beta: float
    end_beta: float

    def __call__(self, moved: float, snap: Snap = float) -> tuple[float, float]:
        beta = snap(self.start_beta + (self.end_beta - self.start_beta) * moved)
        return 1 - beta, beta


@dataclass(frozen=True)
class Alternating:
    """Alpha falls from 1 to 0 and beta rises from 0.1 to 1 in turn, alpha first.

    The dynamic strategy in the manner of the older public version of the authors' point-cloud code
    (October 2023), whose coefficients move at epochs, in turn, and end at (0, 1). Its newest
    version (December 2023) moves beta first and stops at (0.4, 0.7); that one has not been run
    here.

    Args:
        updates: number of moves, at least 2.
    """

    updates: int

    def __post_init__(self) -> None:
        if self.updates < 2:
            raise ValueError(
                f"schedule updates is {self.updates}; the alternating kind needs at least 2, one "
                "for alpha and one for beta"
            )

    def __call__(self, moved: float, snap: Snap = float) -> tuple[float, float]:
        done = round(moved * self.updates)
        alpha = 1 - math.ceil(done / 2) / math.ceil(self.updates / 2)
        beta = min(math.floor(done / 2) / math.floor(self.updates / 2) + 0.1, 1.0)
        return alpha, snap(beta)


SCHEDULES: dict[str, type[Constant | Convex | Alternating]] = {
    "constant": Constant,
    "convex": Convex,
    "alternating": Alternating,
}


@dataclass(frozen=True)
class CoefficientSchedule:
    """A stateless schedule ``schedule(progress) -> (alpha, beta)``.

    Args:
        kind: a name in ``SCHEDULES``, whose class says how the pair moves.
        start_beta, end_beta: in [0, 1], for the kinds that have them.
        duration: fraction of the training, in (0, 1], after which the final pair holds.
        updates: number of equal stages that the duration is divided into, often its epochs; the
            pair moves between two stages. 0 moves it at every iteration.
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
            raise ValueError(f"schedule kind {self.kind!r} is unknown; use one of {[*SCHEDULES]}")
        for name in ("start_beta", "end_beta"):
            if not 0 <= (beta := getattr(self, name)) <= 1:
                raise ValueError(f"schedule {name} is {beta}; it must lie in [0, 1]")
        if not 0 < self.duration <= 1:
            raise ValueError(f"schedule duration is {self.duration}; it must lie in (0, 1]")
        if self.updates < 0:
            raise ValueError(
                f"schedule updates is {self.updates}; give the number of stages, or 0 to move at "
                "every iteration"
            )
        _ = self._pair  # checks the arguments of the kind

    @cached_property
    def _pair(self) -> Kind:
        kind = SCHEDULES[self.kind]
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def __call__(self, progress: float) -> tuple[float, float]:
        """The pair (alpha, beta) at ``progress``, the finished fraction of training in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}; it must lie in [0, 1]")
        moved = min(progress / self.duration, 1.0)
        if self.updates:
            moved = math.floor(moved * self.updates) / self.updates
        return self._pair(moved, snap_to_grid if self.exact else float)
