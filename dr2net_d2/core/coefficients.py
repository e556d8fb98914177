"""Scalars that every pass reads and every checkpoint carries, alpha and beta first of all."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dr2net_d2.core.schedule import BETA_GRID, snap_to_grid

logger = logging.getLogger(__name__)


class HostScalars(nn.Module):
    """Named scalars kept twice: as float64 buffers for checkpoints, as Python floats for reading.

    Reading never synchronises with a device, and ``.half()`` or ``.to(dtype)`` leave the values
    alone. The state dict of a plain network, without the names, loads strictly and changes nothing.
    """

    def __init__(self, **values: float) -> None:
        super().__init__()
        self._host = dict(values)
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def assign(self, **values: float) -> None:
        self._host.update(values)
        for name, value in values.items():
            getattr(self, name).fill_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostScalars:
        super()._apply(fn, recurse)
        for name, value in self._host.items():
            device = getattr(self, name).device
            setattr(self, name, torch.full((), value, dtype=torch.float64, device=device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._host:
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._host = {name: float(getattr(self, name)) for name in self._host}


class Coefficients(HostScalars):
    """The pair (alpha, beta) shared by all steps of a stack.

    Args:
        alpha, beta: in [0, 1], not both 0. The default (1, 0) is the pretrained network.
        grid: beta is snapped to multiples of ``1 / grid``, as exact arithmetic requires; None
            takes any beta.

    Raises:
        ValueError: a value outside [0, 1], or both 0.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(self, alpha: float = 1.0, beta: float = 0.0, grid: int | None = BETA_GRID) -> None:
        super().__init__(alpha=1.0, beta=0.0)
        self.grid = grid
        self.set(alpha, beta)

    @property
    def values(self) -> tuple[float, float]:
        """(alpha, beta) as Python floats."""
        return self._host["alpha"], self._host["beta"]

    def set(self, alpha: float, beta: float) -> tuple[float, float]:
        """Set both; returns them as set, that is with beta snapped to the grid."""
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
        self.assign(alpha=alpha, beta=beta)
        return alpha, beta

    def extra_repr(self) -> str:
        return "alpha={:g}, beta={:g}".format(*self.values)
