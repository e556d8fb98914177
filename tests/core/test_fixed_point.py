"""Exactness of the integer streams, against Python's own integers and fractions."""

from fractions import Fraction

import pytest
import torch

from dr2net_d2.core.fixed_point import pack_bits, unpack_bits
from dr2net_d2.core.stream_range import StreamRange, bits_for_growth
from dr2net_d2.core.streams import FixedPointStream, FloatStream

GRID = [m / 16 for m in range(17)]


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("shape", [(8,), (3, 5, 7), (1,), (16, 4)])
def test_packing_round_trip_at_its_true_width(width, shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2**width, shape, generator=generator, dtype=torch.uint8)
    packed = pack_bits(values, width)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, width, values.shape), values)
    # At most one padding byte for each power of two in the width.
    assert 8 * packed.numel() <= values.numel() * width + 8 * bin(width).count("1")


@pytest.mark.parametrize("beta", GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [(0, 0, 0), (2, 1, 0), (7, 6, 6)])
def test_step_equals_integer_arithmetic_and_inverts(beta, dtype, extra):
    generator = torch.Generator().manual_seed(1)
    stream = FixedPointStream(20, dtype, extra)
    largest = 2 ** (stream.bits - 2) - 1
    state2 = torch.randint(-largest, largest, (5, 33), generator=generator).to(stream.integer)
    state2[0, :4] = torch.tensor([largest, -largest, 0, -1])
    f, h1 = torch.randn(2, 5, 33, generator=generator, dtype=dtype)
    state1 = (h1 * 2.0 ** (20 + extra[1])).round().to(stream.integer)
    alpha = 1 - beta

    state, kept = stream.step(2, f, state1, state2, alpha, beta, keep=True)

    target = f.add(stream.decode(1, state1), alpha=alpha).mul(2.0 ** (20 + extra[2])).round().long()
    scaled_beta = Fraction(beta) / 2 ** (extra[0] - extra[2])
    expected = [
        int(t) + (scaled_beta * int(s)).__floor__()
        for t, s in zip(target.flatten(), state2.flatten(), strict=True)
    ]
    assert state.flatten().tolist() == expected
    assert torch.equal(stream.inverse(2, state, f, state1, kept, alpha, beta), state2)


@pytest.mark.parametrize(
    ("beta", "bits"), [(1, 0), (1 / 2, 1), (1 / 4, 2), (3 / 8, 3), (5 / 16, 4)]
)
def test_remainders_take_their_bits_and_no_more(beta, bits):
    stream = FixedPointStream(20, torch.float32)
    state2 = torch.arange(8000, dtype=torch.int32)
    _, kept = stream.step(1, torch.zeros(8000), state2, state2, 1 - beta, beta, keep=True)
    assert (0 if kept is None else kept.nbytes) == 8000 * bits / 8
    assert stream.step(1, torch.zeros(8000), state2, state2, 1 - beta, beta, False)[1] is None


def test_encode_and_decode():
    stream = FixedPointStream(4, torch.float32)
    assert stream.encode(torch.tensor([1.0, -0.53125, 3.2])).tolist() == [16, -8, 51]
    assert stream.decode(0, torch.tensor([16, -8, 51], dtype=torch.int32)).tolist() == [
        1,
        -0.5,
        3.1875,
    ]


def test_peak_and_overflow_are_seen():
    stream = FixedPointStream(20, torch.float32)
    stream.step(
        1, torch.tensor([3.0, -900.0]), torch.zeros(2).int(), torch.zeros(2).int(), 1.0, 0.5, True
    )
    assert stream.peak() == 900
    assert not stream.overflowed(900) and stream.overflowed(1024.0)
    assert stream.overflowed(float("nan")) and stream.overflowed(float("inf"))
    # 3000 * 2^20 is beyond int32 altogether.
    zero = torch.zeros(1).int()
    stream.step(1, torch.tensor([3000.0]), zero, zero, 1.0, 0.5, True)
    assert stream.overflowed(stream.peak())


@pytest.mark.parametrize(
    ("peak", "integer", "exponent"),
    # 8 * peak * 2^k <= 2^31 (2^63): 31 - 3 - log2(peak), rounded down.
    [(1.0, torch.int32, 28), (16.0, torch.int32, 24), (17.0, torch.int32, 23),
     (1.0, torch.int64, 60)],
)  # fmt: skip
def test_exponent_keeps_eightfold_headroom(peak, integer, exponent):
    stream_range = StreamRange()
    assert not stream_range.measured
    stream_range.widen(peak)
    stream_range.widen(peak / 2)
    assert stream_range.measured and stream_range.exponent(integer) == exponent


def test_streams_that_grow_have_more_bits_where_they_are_small():
    assert bits_for_growth([1.0] * 3) == bits_for_growth([0.5, 1.0, 1.4]) == [0, 0, 0, 0]
    # 1.5, 2.25, 3.4, 5.1, 7.6 and 11.4 fold growth until the end: 3 doublings, one of them spare.
    assert bits_for_growth([1.5] * 6) == [2, 1, 1, 0, 0, 0, 0]
    stream = FixedPointStream(4, torch.float32, [3, 2, 0])
    state = stream.encode(torch.tensor([0.75]))
    assert state.item() == 96 and stream.decode(0, state).item() == 0.75
    assert stream.decode(2, state).item() == 6


def test_beta_off_the_grid_is_refused():
    stream = FixedPointStream(20, torch.float32)
    with pytest.raises(ValueError, match=r"beta is 0\.1; .* multiple of 1/16"):
        stream.step(1, torch.zeros(1), torch.zeros(1).int(), torch.zeros(1).int(), 0.9, 0.1, True)


def test_float_stream_inverts_approximately_and_keeps_the_state_at_beta_0():
    stream = FloatStream(torch.float32)
    f, h1, h2 = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    h, kept = stream.step(1, f, h1, h2, 0.5, 0.5, True)
    assert kept is None
    torch.testing.assert_close(stream.inverse(1, h, f, h1, kept, 0.5, 0.5), h2)
    h, kept = stream.step(1, f, h1, h2, 1.0, 0.0, True)
    assert torch.equal(stream.inverse(1, h, f, h1, kept, 1.0, 0.0), h2)
