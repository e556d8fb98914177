"""The integer arithmetic that gives every step of the coupling an exact inverse.

Legend, for step i of a stack:
    k_i     fractional bits of h_i: k_n of the last stream, and more where streams are smaller
    H_i     (..., C), int32 (int64 in float64 models): the stream h_i as round(h_i * 2^k_i)
    m, s    beta * 2^(k_i - k_{i-2}) = m / 2^s in lowest terms; beta is a multiple of 1/16
    T       round(2^k_i * (F(h_{i-1}) + alpha * h_{i-1})), the same bits in both directions
    Q, r    quotient and remainder: m * H_{i-2} = Q * 2^s + r,  0 <= r < 2^s

    forward   T from H_{i-1};   H_i = T + Q;   r is kept
    inverse   T from H_{i-1};   Q = H_i - T;   H_{i-2} = (Q * 2^s + r) / m

The s bits of r are all of H_{i-2} that H_i lacks. Nothing may leave the integer type, so H_{i-2} is
split:

    H_{i-2} = A * 2^s + b,  0 <= b < 2^s
    forward   r = m * b mod 2^s;            Q = m * A + (m * b >> s)
    inverse   b = r * m^-1 mod 2^s;         A = (Q - (m * b >> s)) * m^-1 mod 2^bits

There is no division: m is odd, so it has an inverse modulo a power of two. At beta = 0 nothing of
H_{i-2} reaches H_i, and H_{i-2} itself is kept instead of r.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from dr2net_d2.core.schedule import BETA_GRID


def beta_as_fraction(beta: float) -> tuple[int, int]:
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


def add_quotient_(target: Tensor, state2: Tensor, m: int, s: int) -> Tensor:
    """Turn T into H_i = T + Q, in place.

    Args:
        target: T.
        state2: H_{i-2}.
        m: odd, below 16.
        s: 1 to 8.

    Returns:
        m * b, uint8 or int16, for ``pack_remainder``.
    """
    product = _times(state2.to(torch.uint8).bitwise_and_(2**s - 1), m, s)
    target.add_(state2 >> s, alpha=m)
    if m > 1:
        target += (product >> s).to(target.dtype)
    return product


def pack_remainder(product: Tensor, s: int) -> Tensor:
    """r, the low s bits of m * b, packed; overwrites ``product``."""
    return pack_bits(product.bitwise_and_(2**s - 1).to(torch.uint8), s)


def recover_dividend_(quotient: Tensor, packed: Tensor, m: int, s: int) -> Tensor:
    """Turn Q into H_{i-2} = (Q * 2^s + r) / m, in place.

    Args:
        quotient: Q.
        packed: r, from ``pack_remainder``.
        m, s: as in ``add_quotient_``.
    """
    low = unpack_bits(packed, s, quotient.shape)
    if m > 1:
        # Integer products wrap around, as modular inverses need.
        low.mul_(_inverse_modulo(m, 8)).bitwise_and_(2**s - 1)
        quotient -= (_times(low, m, s) >> s).to(quotient.dtype)
        quotient *= _inverse_modulo(m, torch.iinfo(quotient.dtype).bits)
    return quotient.bitwise_left_shift_(s).bitwise_or_(low.to(quotient.dtype))


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Pack integers of ``width`` bits (1 to 8) into bytes without unused bits between them.

    Args:
        values: uint8 of any shape, in [0, 2^width).

    Returns:
        uint8 (n,), about ``values.numel() * width / 8`` bytes.
    """
    flat = values.flatten()
    packed = []
    for shift, bits in _powers_of_two(width):
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
    """The inverse of ``pack_bits``: uint8 values of the given shape."""
    numel = shape.numel()
    flat: Tensor | None = None
    start = 0
    for shift, bits in _powers_of_two(width):
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


def _powers_of_two(width: int) -> list[tuple[int, int]]:
    """Fields of 8, 4, 2 or 1 bits that make up ``width``, as (shift, bits): 3 -> (0, 2), (2, 1)."""
    fields, shift = [], 0
    for bits in (8, 4, 2, 1):
        if width & bits:
            fields.append((shift, bits))
            shift += bits
    return fields


def _inverse_modulo(m: int, bits: int) -> int:
    """The inverse of odd m modulo 2^bits, as a signed integer of that width."""
    inverse = pow(m, -1, 1 << bits)
    return inverse - (1 << bits) if inverse >= 1 << (bits - 1) else inverse


def _times(low: Tensor, m: int, s: int) -> Tensor:
    """low * m in a type that holds it; low is a uint8 of s bits, and m is below 16."""
    return low * m if s <= 4 else low.to(torch.int16) * m
