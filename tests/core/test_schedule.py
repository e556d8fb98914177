"""The schedule against tables worked out by hand."""

import pytest

from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.core.schedule import Alternating, Constant, Convex, snap_to_grid


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, (15 / 16, 1 / 16)),
        (0.125, (0.8125, 0.1875)),  # 1/16 + 7/16 / 4 = 0.171875 -> 3/16
        (0.25, (0.75, 0.25)),  # 0.28125 -> 4.5/16, ties to even
        (0.5, (0.5, 0.5)),
        (1.0, (0.5, 0.5)),
    ],
)
def test_convex(progress, expected):
    assert CoefficientSchedule("convex", 1 / 16, 1 / 2, duration=0.5)(progress) == expected


@pytest.mark.parametrize(
    ("done", "expected"),
    # Four stages: alpha, beta, alpha, beta; beta starts at 0.1.
    [(0, (1.0, 0.1)), (1, (0.5, 0.1)), (2, (0.5, 0.6)), (3, (0.0, 0.6)), (4, (0.0, 1.0))],
)
def test_alternating(done, expected):
    schedule = CoefficientSchedule("alternating", duration=0.4, updates=4, exact=False)
    assert schedule(0.1 * done + 1e-9) == pytest.approx(expected)


def test_alternating_snaps_to_the_grid():
    schedule = CoefficientSchedule("alternating", duration=1.0, updates=4)
    assert [schedule(p)[1] * 16 for p in (0.0, 0.5, 1.0)] == [2, 10, 16]


def test_constant_is_a_hard_conversion():
    schedule = CoefficientSchedule("constant", end_beta=0.75)
    assert {schedule(p) for p in (0.0, 0.3, 1.0)} == {(0.25, 0.75)}


def test_stages_hold_between_updates():
    schedule = CoefficientSchedule("convex", 0.0, 1.0, duration=1.0, updates=4)
    assert [schedule(p)[1] for p in (0.0, 0.24, 0.25, 0.49, 0.5, 0.99, 1.0)] == [
        0.0, 0.0, 0.25, 0.25, 0.5, 0.75, 1.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "pairs"),
    # At the beginning, after a quarter and three quarters of the way, at its end; nothing snapped.
    [
        (Constant(0.7), [(0.3, 0.7)] * 4),
        (Convex(0.1, 0.5), [(0.9, 0.1), (0.8, 0.2), (0.6, 0.4), (0.5, 0.5)]),
        (Convex(1.0, 0.0), [(0.0, 1.0), (0.25, 0.75), (0.75, 0.25), (1.0, 0.0)]),
        (Alternating(4), [(1.0, 0.1), (0.5, 0.1), (0.0, 0.6), (0.0, 1.0)]),
        # Of 8 moves, 4 are alpha's, by 1/4, and 4 beta's; the last would end at 1.1.
        (Alternating(8), [(1.0, 0.1), (0.75, 0.35), (0.25, 0.85), (0.0, 1.0)]),
        # Of 3 moves, 2 are alpha's and 1 is beta's.
        (Alternating(3), [(1.0, 0.1), (0.5, 0.1), (0.5, 1.0), (0.0, 1.0)]),
    ],
    ids=str,
)
def test_a_kind_is_a_function_of_the_way_that_it_has_moved(kind, pairs):
    assert [kind(moved) for moved in (0, 1 / 4, 3 / 4, 1)] == [pytest.approx(p) for p in pairs]


def test_snapping_keeps_the_sum_of_a_convex_pair():
    assert Convex(0.1, 0.5)(0.0, snap_to_grid) == (0.875, 0.125)
    assert Alternating(4)(0.0, snap_to_grid) == (1.0, 0.125)


@pytest.mark.parametrize(
    ("beta", "snapped"), [(0.0, 0), (0.001, 1 / 16), (0.1, 2 / 16), (0.5, 0.5), (0.99, 1)]
)
def test_snap(beta, snapped):
    assert snap_to_grid(beta) == snapped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "cosine"}, ["'cosine'", "convex"]),
        ({"end_beta": 1.5}, ["end_beta", "1.5", "[0, 1]"]),
        ({"start_beta": float("nan")}, ["start_beta", "nan"]),
        ({"duration": 0}, ["duration", "0", "(0, 1]"]),
        ({"updates": -1}, ["updates", "-1"]),
        ({"kind": "constant", "end_beta": -0.5}, ["end_beta", "-0.5", "[0, 1]"]),
        # Not used by these kinds, and refused all the same.
        ({"kind": "constant", "start_beta": -1.0}, ["start_beta", "-1", "[0, 1]"]),
        ({"kind": "alternating", "updates": 4, "end_beta": 2.0}, ["end_beta", "2", "[0, 1]"]),
        ({"kind": "alternating", "updates": 1}, ["updates", "1", "2"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        CoefficientSchedule(**arguments)
    assert all(word in str(error.value) for word in words)


def test_progress_out_of_range():
    with pytest.raises(ValueError, match=r"progress is 1\.1"):
        CoefficientSchedule()(1.1)
