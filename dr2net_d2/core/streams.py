"""The arithmetics of the residual streams: how h_i is held, computed, and taken back.

A *state* is a stream h_i as an arithmetic holds it: an integer tensor H_i in fixed point, h_i
itself in floating point. Every arithmetic computes ``h_i = F_i(h_{i-1}) + alpha * h_{i-1} +
beta * h_{i-2}`` and its inverse on states; F_i is called with decoded ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dr2net_d2.core.coupling import couple, uncouple
from dr2net_d2.core.fixed_point import (
    add_quotient_,
    beta_as_fraction,
    pack_remainder,
    recover_dividend_,
)
from dr2net_d2.core.replay import has_values

INTEGER_TYPES = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The integers that hold the streams of a model, by the dtype that the streams decode to."""


class Stream(ABC):
    """One arithmetic, as used by one forward and its backward.

    A forward calls ``encode`` once and then, for i = 1 ... n, ``step`` and ``decode``. A backward
    calls, for i = n ... 1, ``decode`` on state_{i-1} and ``inverse``. An arithmetic implements
    these four. One whose inverse is exact also overrides ``checksum``, by which a backward notices
    a function that gave another value; one whose states mean nothing without an exponent overrides
    ``exponent_tensor`` and ``with_exponent``.

    Args:
        dtype: of the decoded streams, torch.float32 or torch.float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def encode(self, h: Tensor) -> Tensor:
        """h_0, of ``dtype``, to state_0."""

    @abstractmethod
    def decode(self, i: int, state: Tensor) -> Tensor:
        """state_i to h_i, of ``dtype``."""

    @abstractmethod
    def step(
        self,
        i: int,
        f: Tensor,
        state1: Tensor,
        state2: Tensor,
        alpha: float,
        beta: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """One step forward.

        Args:
            i: number of the step, from 1.
            f: F_i(h_{i-1}), any floating dtype.
            state1, state2: state_{i-1}, state_{i-2}; left as they are.
            keep: whether there will be an inverse.

        Returns:
            state_i, and the remainder: whatever else the inverse needs, state_{i-2} itself at
            beta = 0. None if it needs nothing, or without ``keep``.
        """

    @abstractmethod
    def inverse(
        self,
        i: int,
        state: Tensor,
        f: Tensor,
        state1: Tensor,
        remainder: Tensor | None,
        alpha: float,
        beta: float,
    ) -> Tensor:
        """One step back: state_{i-2} from state_i, F_i(h_{i-1}) computed again, and the remainder.

        Args are those of ``step``.
        """

    def checksum(self, state: Tensor) -> Tensor | None:
        """A scalar, equal for equal states; None where an inverse is not exact anyway."""
        return None

    def exponent_tensor(self) -> Tensor | None:
        """The exponent of the states, saved with the final ones; None if there is none."""
        return None

    def with_exponent(self, exponent: Tensor | None) -> Stream:
        """This arithmetic at a saved exponent.

        A checkpoint around the stack repeats the forward, whose exponent may then be another one.
        """
        return self


class FloatStream(Stream):
    """Streams in floating point, the literature's way: the inverse is inexact."""

    def encode(self, h: Tensor) -> Tensor:
        return h

    def decode(self, i: int, state: Tensor) -> Tensor:
        return state

    def step(
        self,
        i: int,
        f: Tensor,
        state1: Tensor,
        state2: Tensor,
        alpha: float,
        beta: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        state = couple(f, state1, state2, alpha, beta)
        return state, (state2 if keep and beta == 0 else None)

    def inverse(
        self,
        i: int,
        state: Tensor,
        f: Tensor,
        state1: Tensor,
        remainder: Tensor | None,
        alpha: float,
        beta: float,
    ) -> Tensor:
        return remainder if remainder is not None else uncouple(state, f, state1, alpha, beta)


class FixedPointStream(Stream):
    """Streams as integers ``H_i = round(h_i * 2^k_i)``; see ``fixed_point`` for the symbols.

    Args:
        exponent: k_n, the fractional bits of the last stream.
        dtype: of the decoded streams, torch.float32 or torch.float64.
        offsets: k_i - k_n for i = 0 ... n, see ``stream_range.bits_for_growth``; all 0 by default.

    Attributes:
        integer: torch.int32 or torch.int64, the dtype of the states.
        bits: their width.
    """

    def __init__(
        self, exponent: int, dtype: torch.dtype, offsets: Sequence[int] | None = None
    ) -> None:
        super().__init__(dtype)
        self.exponent = exponent
        self.integer = INTEGER_TYPES[dtype]
        self.bits = torch.iinfo(self.integer).bits
        self._offsets = offsets
        self._extremes: list[Tensor] = []

    def encode(self, h: Tensor) -> Tensor:
        scaled = h.contiguous().mul(self._scale(0))
        self._observe(scaled)
        return scaled.round_().to(self.integer)

    def decode(self, i: int, state: Tensor) -> Tensor:
        return state.to(self.dtype).mul_(1 / self._scale(i))

    def step(
        self,
        i: int,
        f: Tensor,
        state1: Tensor,
        state2: Tensor,
        alpha: float,
        beta: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The remainder is r, packed: s bits an element, nothing at beta = 1."""
        state = self._target(i, f, state1, alpha, observe=True)
        m, s = self._scaled_beta(i, beta)
        remainder = None
        if m == 0:
            remainder = state2 if keep else None
        elif s == 0:
            state += state2
        else:
            product = add_quotient_(state, state2, m, s)
            if keep:
                remainder = pack_remainder(product, s)
        self._observe(state)
        return state, remainder

    def inverse(
        self,
        i: int,
        state: Tensor,
        f: Tensor,
        state1: Tensor,
        remainder: Tensor | None,
        alpha: float,
        beta: float,
    ) -> Tensor:
        m, s = self._scaled_beta(i, beta)
        if m == 0:
            assert remainder is not None
            return remainder
        quotient = self._target(i, f, state1, alpha)
        torch.sub(state, quotient, out=quotient)
        return quotient if remainder is None else recover_dividend_(quotient, remainder, m, s)

    def checksum(self, state: Tensor) -> Tensor:
        return state.sum(dtype=state.dtype)

    def exponent_tensor(self) -> Tensor:
        return torch.tensor(self.exponent)

    def with_exponent(self, exponent: Tensor | None) -> Stream:
        assert exponent is not None
        if not has_values(exponent):
            return self
        return FixedPointStream(int(exponent), self.dtype, self._offsets)

    def peak(self) -> float:
        """The largest |h_i| * 2^(k_i - k_n) so far (nan if one was): one host synchronisation."""
        largest = torch.stack(self._extremes).abs().amax()
        return float(largest) * 2.0**-self.exponent

    def overflowed(self, peak: float) -> bool:
        """Whether sums of two streams of this peak could leave the integer type; true for nan."""
        return not peak * 2.0**self.exponent < 2.0 ** (self.bits - 2)

    def _target(
        self, i: int, f: Tensor, state1: Tensor, alpha: float, observe: bool = False
    ) -> Tensor:
        """T, in the layout of the state whatever that of f, so that both directions see the same.

        Products with powers of two are exact: this rounds as f + alpha * h_{i-1} does.
        """
        scaled = state1.to(self.dtype)
        torch.add(f, scaled, alpha=alpha / self._scale(i - 1), out=scaled)
        scaled.mul_(self._scale(i))
        if observe:
            self._observe(scaled)
        return scaled.round_().to(self.integer)

    def _scaled_beta(self, i: int, beta: float) -> tuple[int, int]:
        """(m, s); m = 0 at beta = 0."""
        m, s = beta_as_fraction(beta)
        return m, s + self._offset(i - 2) - self._offset(i) if m else 0

    def _scale(self, i: int) -> float:
        """2^k_i."""
        return 2.0 ** (self.exponent + self._offset(i))

    def _offset(self, i: int) -> int:
        """k_i - k_n; h_{-1} has the bits of h_0."""
        return 0 if self._offsets is None else self._offsets[max(i, 0)]

    def _observe(self, values: Tensor) -> None:
        self._extremes.extend(extreme.to(self.dtype) for extreme in torch.aminmax(values))
