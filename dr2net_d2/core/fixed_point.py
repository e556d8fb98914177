"""Residual streams in fixed point, where every step of the coupling has an exact inverse.

Legend, for one step i of a stack:
    k_i     fractional bits of h_i: those of h_n, and more where the streams were smaller
    H_i     int32 (int64 for float64 models), the stream h_i as round(h_i * 2^k_i)
    m, s    beta * 2^(k_i - k_{i-2}) = m / 2^s with m odd (or s = 0); beta is a multiple of 1/16
    T       round(2^k_i * (F(h_{i-1}) + alpha * h_{i-1})), computed alike in both directions

    forward   T from H_{i-1};   m * H_{i-2} = Q * 2^s + r,  0 <= r < 2^s;   H_i = T + Q;   keep r
    inverse   T from H_{i-1};   Q = H_i - T;   H_{i-2} = (Q * 2^s + r) / m

The s bits of r are all that h_i lacks. To stay inside the integer type H is split as A * 2^s + b:
then r = m * b mod 2^s, Q = m * A + (m * b >> s), and the inverse gets b and A by multiplying with
the inverse of m modulo 2^s and modulo 2^32: no division, no overflow. At beta = 0 nothing of
h_{i-2} reaches h_i, and H_{i-2} itself is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from dr2net_d2.core.coefficients import HostScalars
from dr2net_d2.core.coupling import couple, uncouple
from dr2net_d2.core.schedule import BETA_GRID

INTEGER_TYPES = {torch.float32: torch.int32, torch.float64: torch.int64}
HEADROOM_BITS = 3
SPARE_BITS = 1


def _parts(width: int) -> list[tuple[int, int]]:
    """(shift, bits) pairs that split ``width`` bits into powers of two: 3 -> [(0, 2), (2, 1)]."""
    parts, shift = [], 0
    for bits in (8, 4, 2, 1):
        if width & bits:
            parts.append((shift, bits))
            shift += bits
    return parts


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Pack integers of ``width`` bits (1 to 8) into bytes at that width, no more.

    Args:
        values: uint8 of any shape, in [0, 2^width).

    Returns:
        uint8 (n,), about ``values.numel() * width / 8`` bytes.
    """
    flat = values.flatten()
    packed = []
    for shift, bits in _parts(width):
        per_byte = 8 // bits
        piece = flat if bits == width else (flat >> shift) & (2**bits - 1)
        if missing := -len(piece) % per_byte:
            piece = torch.nn.functional.pad(piece, (0, missing))
        rows = piece.view(per_byte, -1)
        byte = rows[0].clone()
        for j in range(1, per_byte):
            byte |= rows[j] << (j * bits)
        packed.append(byte)
    return packed[0] if len(packed) == 1 else torch.cat(packed)


def unpack_bits(packed: Tensor, width: int, shape: torch.Size) -> Tensor:
    """The uint8 values of ``shape`` that ``pack_bits`` packed."""
    numel = shape.numel()
    flat: Tensor | None = None
    start = 0
    for shift, bits in _parts(width):
        per_byte = 8 // bits
        byte = packed[start : start + -(-numel // per_byte)]
        start += len(byte)
        rows = byte.new_empty(per_byte, len(byte))
        for j in range(per_byte):
            torch.bitwise_right_shift(byte, j * bits, out=rows[j])
        piece = rows.bitwise_and_(2**bits - 1).flatten()[:numel]
        flat = piece if flat is None else flat.bitwise_or_(piece << shift)
    assert flat is not None
    return flat.view(shape)


def _inverse_modulo(m: int, bits: int) -> int:
    """The inverse of odd m modulo 2^bits, as a signed integer of that width."""
    inverse = pow(m, -1, 1 << bits)
    return inverse - (1 << bits) if inverse >= 1 << (bits - 1) else inverse


class FloatStream:
    """Streams in floating point: the literature's way, inexact. Same interface as the exact one.

    Args:
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

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
        kept: Tensor | None,
        alpha: float,
        beta: float,
    ) -> Tensor:
        return kept if kept is not None else uncouple(state, f, state1, alpha, beta)


class FixedPointStream:
    """Streams as integers ``round(h_i * 2^k_i)``; one object serves one pass.

    Args:
        exponent: k_n, the number of fractional bits of the last stream.
        dtype: torch.float32 or torch.float64, the dtype of the decoded stream.
        extra_bits: k_i - k_n for i = 0 ... n, see ``extra_bits``; all 0 by default.
    """

    def __init__(
        self, exponent: int, dtype: torch.dtype, extra_bits: Sequence[int] | None = None
    ) -> None:
        self.exponent = exponent
        self.extra_bits = extra_bits
        self.dtype = dtype
        self.integer = INTEGER_TYPES[dtype]
        self.bits = torch.iinfo(self.integer).bits
        self._extremes: list[Tensor] = []

    def encode(self, h: Tensor) -> Tensor:
        """h_0 -> H_0."""
        scaled = h.contiguous().mul(self._scale(0))
        self._observe(scaled)
        return scaled.round_().to(self.integer)

    def decode(self, i: int, state: Tensor) -> Tensor:
        """H_i -> h_i."""
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
        """One step forward.

        Args:
            i: its number, from 1.
            f: F_i(h_{i-1}), any floating dtype.
            state1, state2: H_{i-1}, H_{i-2}.
            keep: whether there will be an inverse.

        Returns:
            H_i and what has to be kept for the inverse: the packed remainder (s bits an element),
            H_{i-2} itself at beta = 0, None at beta = 1 and without ``keep``.
        """
        state = self._target(i, f, state1, alpha, observe=True)
        m, s = self._fraction(i, beta)
        kept = None
        if m == 0:
            kept = state2 if keep else None
        elif s == 0:
            state += state2
        else:
            low = _product(state2.to(torch.uint8).bitwise_and_(2**s - 1), m, s)
            state.add_(state2 >> s, alpha=m)
            if m > 1:
                state += (low >> s).to(self.integer)
            if keep:
                kept = pack_bits(low.bitwise_and_(2**s - 1).to(torch.uint8), s)
        self._observe(state)
        return state, kept

    def inverse(
        self,
        i: int,
        state: Tensor,
        f: Tensor,
        state1: Tensor,
        kept: Tensor | None,
        alpha: float,
        beta: float,
    ) -> Tensor:
        """One step back: H_{i-2} from H_i, from F_i(h_{i-1}) computed again, and from ``kept``."""
        m, s = self._fraction(i, beta)
        if m == 0:
            assert kept is not None
            return kept
        quotient = self._target(i, f, state1, alpha)
        torch.sub(state, quotient, out=quotient)
        if kept is None:
            return quotient
        low = unpack_bits(kept, s, state.shape)
        if m > 1:
            # Integer products wrap around, which is what inverses modulo 2^s and 2^bits need.
            low.mul_(_inverse_modulo(m, 8)).bitwise_and_(2**s - 1)
            quotient -= (_product(low, m, s) >> s).to(self.integer)
            quotient *= _inverse_modulo(m, self.bits)
        return quotient.bitwise_left_shift_(s).bitwise_or_(low.to(self.integer))

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
        # Products with powers of two are exact: this rounds as f + alpha * h_{i-1} does. The result
        # has the layout of the state, whatever that of f, so both directions see the same.
        scaled = state1.to(self.dtype)
        torch.add(f, scaled, alpha=alpha / self._scale(i - 1), out=scaled)
        scaled.mul_(self._scale(i))
        if observe:
            self._observe(scaled)
        return scaled.round_().to(self.integer)

    def _extra(self, i: int) -> int:
        return 0 if self.extra_bits is None else self.extra_bits[max(i, 0)]

    def _scale(self, i: int) -> float:
        return 2.0 ** (self.exponent + self._extra(i))

    def _fraction(self, i: int, beta: float) -> tuple[int, int]:
        m, s = _fraction(beta)
        return m, s + self._extra(i - 2) - self._extra(i) if m else 0

    def _observe(self, values: Tensor) -> None:
        self._extremes.extend(extreme.to(self.dtype) for extreme in torch.aminmax(values))


class StreamRange(HostScalars):
    """The running peak of |h_i| * 2^(k_i - k_n), from which the fractional bits follow.

    The peak is saved with the model; 0 means that no pass has been seen. Coefficients that make the
    streams grow otherwise lead to another peak, so k_0 - k_n is saved with it.
    """

    def __init__(self) -> None:
        super().__init__(peak=0.0, extra_bits=0.0)

    @property
    def largest(self) -> float:
        value = self._host["peak"]
        assert isinstance(value, float)
        return value

    @property
    def measured(self) -> bool:
        return self.largest > 0

    def follow(self, extra_bits: int) -> None:
        """Forget the peak if it is that of another k_0 - k_n."""
        if extra_bits != self._host["extra_bits"]:
            self.assign(peak=0.0, extra_bits=float(extra_bits))

    def widen(self, peak: float) -> None:
        if peak > self.largest:
            self.assign(peak=peak)

    def exponent(self, dtype: torch.dtype) -> int:
        """k_n: the largest that keeps 8x headroom over the peak in the integer type."""
        bits = torch.iinfo(INTEGER_TYPES[dtype]).bits - 1
        # The least tiny peak still gives an exponent whose powers of two are finite floats.
        return bits - HEADROOM_BITS - math.ceil(math.log2(max(self.largest, 2.0**-40)))


def extra_bits(growths: Sequence[float]) -> list[int]:
    """k_i - k_n for i = 0 ... n, so that small streams before large ones keep their precision.

    A float is precise relative to itself, an integer relative to the largest. Where
    alpha + beta > 1 makes the streams grow, early ones get more bits. That costs two remainder bits
    an element for each doubling after the first.

    Args:
        growths: factors by which the steps 1 ... n can make the streams grow, below 2.
    """
    bits, growth = [0], 1.0
    for factor in reversed(growths):
        growth *= max(factor, 1.0)
        bits.append(max(0, math.floor(math.log2(growth)) - SPARE_BITS))
    return bits[::-1]


def _product(low: Tensor, m: int, s: int) -> Tensor:
    """low * m in a type that holds it; low has s bits, and m is below 16."""
    return low * m if s <= 4 else low.to(torch.int16) * m


def _fraction(beta: float) -> tuple[int, int]:
    """(m, s) with beta = m / 2^s in lowest terms.

    Raises:
        ValueError: beta is not a multiple of 1/16.
    """
    fraction = Fraction(beta)
    if BETA_GRID % fraction.denominator:
        raise ValueError(
            f"beta is {beta}; exact arithmetic needs a multiple of 1/{BETA_GRID} "
            "(Coefficients snaps to it unless grid=None)"
        )
    return fraction.numerator, fraction.denominator.bit_length() - 1
