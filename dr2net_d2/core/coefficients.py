"""Scalars that every pass reads and every checkpoint carries, above all alpha and beta."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dr2net_d2.core.schedule import BETA_GRID, Schedule, Values, snap_to_grid

logger = logging.getLogger(__name__)


Scalar = float | tuple[float, ...]


class HostScalars(nn.Module):
    """Named scalars kept twice: as float64 buffers for checkpoints, as Python floats for reading.

    A value may be a tuple; its buffer then has that many elements. Reading never synchronises with
    a device, and ``.half()`` or ``.to(dtype)`` leave the values alone. The state dict of a plain
    network, which has no such names, loads strictly and changes nothing.
    """

    def __init__(self, **values: Scalar) -> None:
        super().__init__()
        self._host = dict(values)
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def assign(self, **values: Scalar) -> None:
        self._host.update(values)
        for name, value in values.items():
            buffer = getattr(self, name)
            fresh = torch.tensor(value, dtype=torch.float64, device=buffer.device)
            if buffer.shape == fresh.shape:
                buffer.copy_(fresh)
            else:
                setattr(self, name, fresh)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostScalars:
        super()._apply(fn, recurse)
        for name, value in self._host.items():
            device = getattr(self, name).device
            setattr(self, name, torch.tensor(value, dtype=torch.float64, device=device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._host:
            saved = state_dict.setdefault(prefix + name, getattr(self, name))
            if saved.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self._host:
            value = getattr(self, name).tolist()
            self._host[name] = tuple(value) if isinstance(value, list) else value


class Coefficients(HostScalars):
    """The pair (alpha, beta) of all steps of a stack, or one pair for each of its functions.

    Args:
        alpha, beta: in [0, 1], not both 0; a number, or a sequence with one for each function. The
            default (1, 0) is the pretrained network.
        grid: beta is snapped to multiples of ``1 / grid``, as exact arithmetic requires; None
            takes any beta.

    Raises:
        ValueError: a value outside [0, 1], a pair of zeros, sequences of different lengths.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        alpha: Values = 1.0,
        beta: Values = 0.0,
        grid: int | None = BETA_GRID,
    ) -> None:
        super().__init__(alpha=1.0, beta=0.0)
        self.grid = grid
        self.set(alpha, beta)

    @property
    def values(self) -> tuple[Scalar, Scalar]:
        """(alpha, beta) as floats, or as tuples with one value for each function."""
        return self._host["alpha"], self._host["beta"]

    def pairs(self, functions: int) -> list[tuple[float, float]]:
        """The pair (alpha, beta) of each function of a stack that has so many."""
        alphas, betas = (_repeated(value, functions) for value in self.values)
        if len(alphas) != functions:
            raise ValueError(
                f"there are {len(alphas)} pairs of coefficients for {functions} functions; give "
                f"one pair for all, or {functions}"
            )
        return list(zip(alphas, betas, strict=True))

    def set(self, alpha: Values, beta: Values) -> tuple[Scalar, Scalar]:
        """Set both; returns them as set, that is with beta snapped to the grid."""
        alphas, betas = checked(alpha, beta, self.grid)
        for asked, snapped in zip(_listed(_numbers(beta)), _listed(betas), strict=False):
            if snapped != asked:
                logger.info("beta %g snapped to %g (grid 1/%d)", asked, snapped, self.grid)
        self.assign(alpha=alphas, beta=betas)
        return self.values

    def extra_repr(self) -> str:
        alpha, beta = self.values
        return f"alpha={alpha}, beta={beta}"


def coefficients_at(
    schedule: Schedule, progress: float, grid: int | None = BETA_GRID
) -> tuple[Scalar, Scalar]:
    """(alpha, beta) of a schedule as ``Coefficients(grid=grid)`` would be set to them.

    Args:
        schedule: a ``CoefficientSchedule``, or a function of one's own.
        progress: finished fraction of the training, in [0, 1].
        grid: see ``Coefficients``.

    Raises:
        ValueError: names the schedule; it gave no pair, or one that ``Coefficients`` refuses.
    """
    values = schedule(progress)
    try:
        alpha, beta = values
        return checked(alpha, beta, grid)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the schedule {schedule_name(schedule)} returned {values!r} at progress "
            f"{progress:g}: {error}; it must return a pair (alpha, beta), each a number in [0, 1] "
            "or a sequence with one for each residual function"
        ) from error


def schedule_name(schedule: Schedule) -> str:
    """What messages call a schedule: a function's name, or the ``repr`` of an object."""
    return getattr(schedule, "__qualname__", None) or repr(schedule)


def checked(alpha: Values, beta: Values, grid: int | None) -> tuple[Scalar, Scalar]:
    """Floats, or tuples of one length if either is a sequence; beta snapped to the grid.

    Raises:
        ValueError: see ``Coefficients``.
    """
    alpha, beta = _numbers(alpha), _numbers(beta)
    if isinstance(alpha, float) and isinstance(beta, float):
        return _checked_pair(alpha, beta, grid)
    lengths = {len(value) for value in (alpha, beta) if isinstance(value, tuple)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"alpha and beta have {sorted(lengths)} values; give both the same number, or one "
            "value for all"
        )
    (count,) = lengths
    pairs = zip(_repeated(alpha, count), _repeated(beta, count), strict=True)
    alphas, betas = zip(*(_checked_pair(a, b, grid) for a, b in pairs), strict=True)
    return alphas, betas


def _checked_pair(alpha: float, beta: float, grid: int | None) -> tuple[float, float]:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
    if alpha == 0 and beta == 0:
        raise ValueError("alpha and beta are both 0: the streams would be lost; raise one")
    return alpha, beta if grid is None else snap_to_grid(beta, grid)


def _numbers(value: Values) -> Scalar:
    """A float, or a tuple of floats for any iterable: arrays and tensors too."""
    try:
        return tuple(float(number) for number in value)  # type: ignore[union-attr]
    except TypeError:
        return float(value)  # type: ignore[arg-type]


def _listed(value: Scalar) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _repeated(value: Scalar, count: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * count
