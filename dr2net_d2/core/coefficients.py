"""Scalars that every pass reads and every checkpoint carries, alpha and beta first of all."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dr2net_d2.core.schedule import BETA_GRID, snap_to_grid

logger = logging.getLogger(__name__)


Scalar = float | tuple[float, ...]


class HostScalars(nn.Module):
    """Named scalars kept twice: as float64 buffers for checkpoints, as Python floats for reading.

    A value may be a tuple; its buffer then has that many elements. Reading never synchronises with
    a device, and ``.half()`` or ``.to(dtype)`` leave the values alone. The state dict of a plain
    network, without the names, loads strictly and changes nothing.
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
        alpha, beta: in [0, 1], not both 0; a float, or a sequence with one value per function. The
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
        alpha: float | Sequence[float] = 1.0,
        beta: float | Sequence[float] = 0.0,
        grid: int | None = BETA_GRID,
    ) -> None:
        super().__init__(alpha=1.0, beta=0.0)
        self.grid = grid
        self.set(alpha, beta)

    @property
    def values(self) -> tuple[Scalar, Scalar]:
        """(alpha, beta), floats; or tuples, where functions have their own."""
        return self._host["alpha"], self._host["beta"]

    def pairs(self, functions: int) -> list[tuple[float, float]]:
        """(alpha, beta) of each of a number of functions."""
        alphas, betas = (_repeated(value, functions) for value in self.values)
        if len(alphas) != functions:
            raise ValueError(
                f"there are {len(alphas)} pairs of coefficients for {functions} functions; give "
                f"one pair for all, or {functions}"
            )
        return list(zip(alphas, betas, strict=True))

    def set(
        self, alpha: float | Sequence[float], beta: float | Sequence[float]
    ) -> tuple[Scalar, Scalar]:
        """Set both; returns them as set, that is with beta snapped to the grid."""
        lengths = {len(value) for value in (alpha, beta) if isinstance(value, Sequence)}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                f"alpha and beta have {sorted(lengths)} values; give both the same number, or one "
                "value for all"
            )
        count = max(lengths, default=1)
        pairs = [
            self._checked(a, b)
            for a, b in zip(_repeated(alpha, count), _repeated(beta, count), strict=True)
        ]
        alphas, betas = zip(*pairs, strict=True)
        if lengths:
            self.assign(alpha=alphas, beta=betas)
        else:
            self.assign(alpha=alphas[0], beta=betas[0])
        return self.values

    def _checked(self, alpha: float, beta: float) -> tuple[float, float]:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
        if alpha == 0 and beta == 0:
            raise ValueError("alpha and beta are both 0: the streams would be lost; raise one")
        if self.grid is not None:
            snapped = snap_to_grid(beta, self.grid)
            if snapped != beta:
                logger.info("beta %g snapped to %g (grid 1/%d)", beta, snapped, self.grid)
            beta = snapped
        return float(alpha), float(beta)

    def extra_repr(self) -> str:
        alpha, beta = self.values
        return f"alpha={alpha}, beta={beta}"


def _repeated(value: float | Sequence[float], count: int) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * count
