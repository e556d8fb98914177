"""How many fractional bits fixed-point streams get; see ``fixed_point`` for the symbols."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dr2net_d2.core.coefficients import HostScalars

HEADROOM_BITS = 3
"""Streams may become 2^3 times as large as any seen before they overflow."""

SPARE_DOUBLINGS = 1
"""Doublings that streams may grow by before earlier ones get more bits."""


class StreamRange(HostScalars):
    """The running peak of |h_i| * 2^(k_i - k_n), from which the fractional bits follow.

    Saved with the model, together with k_0 - k_n: coefficients that make the streams grow by
    another factor lead to another peak. A peak of 0 means that no pass has been seen.
    """

    def __init__(self) -> None:
        # The names of the buffers are those in checkpoints.
        super().__init__(peak=0.0, extra_bits=0.0)

    @property
    def largest(self) -> float:
        """The peak."""
        value = self._host["peak"]
        assert isinstance(value, float)
        return value

    @property
    def measured(self) -> bool:
        return self.largest > 0

    def follow(self, first_offset: int) -> None:
        """Forget the peak if it was measured at another k_0 - k_n."""
        if first_offset != self._host["extra_bits"]:
            self.assign(peak=0.0, extra_bits=float(first_offset))

    def widen(self, peak: float) -> None:
        if peak > self.largest:
            self.assign(peak=peak)

    def exponent(self, integer: torch.dtype) -> int:
        """k_n: the largest at which an integer type keeps 8x headroom over the peak."""
        bits = torch.iinfo(integer).bits - 1
        # Even for a tiny peak the powers of two have to be finite floats.
        return bits - HEADROOM_BITS - math.ceil(math.log2(max(self.largest, 2.0**-40)))


def bits_for_growth(growths: Sequence[float]) -> list[int]:
    """The offsets k_i - k_n for i = 0 ... n: more bits for streams that are small before they grow.

    An integer is precise relative to the largest stream, a float relative to itself. So where
    alpha + beta > 1 makes the streams grow, earlier ones get more bits. That costs two remainder
    bits an element for each doubling after the first.

    Args:
        growths: factors by which steps 1 ... n can make the streams grow, below 2.
    """
    offsets, growth = [0], 1.0
    for factor in reversed(growths):
        growth *= max(factor, 1.0)
        offsets.append(max(0, math.floor(math.log2(growth)) - SPARE_DOUBLINGS))
    return offsets[::-1]
