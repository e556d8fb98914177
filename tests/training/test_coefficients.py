"""Coefficients that a schedule gives, one pair for all functions or one for each."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dr2net_d2.core import Coefficients, CoefficientSchedule, ReversibleSequence, coefficients_at
from dr2net_d2.errors import ConfigError
from dr2net_d2.training import format_coefficients, passed_pairs, update_coefficients


def stack(functions, arithmetic="exact"):
    layers = [nn.Linear(4, 4) for _ in range(functions)]
    return ReversibleSequence(layers, Coefficients(), arithmetic=arithmetic)


def rising(functions, progress):
    """Betas of 0 to ``progress``, evenly over the functions."""
    betas = [progress * i / (functions - 1) for i in range(functions)]
    return [1 - beta for beta in betas], betas


def test_every_function_gets_its_own_pair_and_the_scalars_say_what_they_are():
    model = nn.Sequential(stack(5))
    scalars = update_coefficients(model, partial(rising, 5), 5, 10)
    assert model[0].coefficients.values == (
        (1.0, 0.875, 0.75, 0.625, 0.5),
        (0.0, 0.125, 0.25, 0.375, 0.5),
    )
    assert {key: value for key, value in scalars.items() if "a" in key.removeprefix("dr2net/")} == {
        "dr2net/alpha": 0.75, "dr2net/alpha_min": 0.5, "dr2net/alpha_max": 1.0,
        "dr2net/beta": 0.25, "dr2net/beta_min": 0.0, "dr2net/beta_max": 0.5,
        "dr2net/stream_peak": 0.0, "dr2net/fraction_bits": scalars["dr2net/fraction_bits"],
    }  # fmt: skip
    assert format_coefficients(scalars) == "alpha 0.5 to 1, beta 0 to 0.5"


def test_functions_are_counted_through_all_stacks():
    model = nn.Sequential(stack(2), nn.Linear(4, 4), stack(3))
    update_coefficients(model, partial(rising, 5), 5, 10)
    assert model[0].coefficients.values == ((1.0, 0.875), (0.0, 0.125))
    assert model[2].coefficients.values == ((0.75, 0.625, 0.5), (0.25, 0.375, 0.5))


def test_one_value_for_all_may_stand_beside_one_for_each():
    model = stack(3)
    update_coefficients(model, lambda progress: (0.5, [0.0, 0.25, 0.5]), 0, 10)
    assert model.coefficients.values == ((0.5, 0.5, 0.5), (0.0, 0.25, 0.5))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_arrays_and_tensors_are_taken(kind):
    model = stack(2)
    update_coefficients(model, lambda progress: (kind([0.5, 0.75]), kind([0.5, 0.25])), 0, 10)
    assert model.coefficients.values == ((0.5, 0.75), (0.5, 0.25))
    update_coefficients(model, lambda progress: (kind(0.25), Fraction(3, 4)), 0, 10)
    assert model.coefficients.values == (0.25, 0.75)


def test_beta_is_snapped_without_a_line_in_every_iteration(caplog):
    model = stack(2)
    with caplog.at_level("INFO"):
        scalars = update_coefficients(model, lambda progress: (0.5, 0.3), 0, 10)
    assert scalars["dr2net/beta"] == model.coefficients.values[1] == 0.3125
    assert not caplog.messages
    floating = stack(2, "float")
    scalars = update_coefficients(floating, lambda progress: (0.5, 0.3), 0, 10)
    assert scalars == {"dr2net/alpha": 0.5, "dr2net/beta": 0.3}
    assert format_coefficients(scalars) == "alpha 0.5, beta 0.3"


def late_error(progress):
    return 0.5, 1.2 * progress


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (late_error, ["late_error", "(0.5, 1.08)", "progress 0.9", "beta is 1.08", "[0, 1]"]),
        (lambda progress: 0.5, ["returned 0.5", "a pair (alpha, beta)"]),
        (lambda progress: None, ["returned None", "a pair"]),
        (lambda progress: (0.5, 0.25, 0.25), ["(0.5, 0.25, 0.25)", "a pair"]),
        (lambda progress: (0.5, "half"), ["'half'", "a pair"]),
        (lambda progress: (0.5, [0.5, None]), ["None", "a pair"]),
        (lambda progress: ([0.5], [0.5, 0.5]), ["[1, 2] values", "the same number"]),
        (lambda progress: ([], []), ["[0] values"]),
        (lambda progress: (0, 0), ["both 0"]),
        (lambda progress: (float("nan"), 0.5), ["alpha is nan"]),
        (partial(rising, 3), ["rising", "3 pairs", "4 blocks", "or 4"]),
    ],
)
def test_what_a_schedule_must_not_return_is_named_and_changes_nothing(schedule, words):
    model = stack(4)
    model.coefficients.set(0.5, 0.5)
    with pytest.raises(ConfigError) as error:
        update_coefficients(model, schedule, 9, 10)
    assert all(word in str(error.value) for word in ["the schedule ", *words])
    assert model.coefficients.values == (0.5, 0.5)


def test_a_model_without_a_stack_never_asks_the_schedule():
    assert update_coefficients(nn.Linear(4, 4), late_error, 9, 10) == {}


def test_a_schedule_is_named_by_its_function_or_by_itself():
    for schedule, name in [(late_error, "late_error"), (partial(late_error), "partial(")]:
        with pytest.raises(ValueError, match=rf"^the schedule .*{name[:7]}.* returned"):
            coefficients_at(schedule, 0.9)


def test_the_distinct_pairs_of_a_training():
    schedule = CoefficientSchedule("convex", 0.25, 0.5, duration=0.5)
    sixteenths = [beta * 16 for _, beta in passed_pairs(schedule, 100)]
    assert sixteenths == [4, 5, 6, 7, 8]
    assert passed_pairs(lambda progress: (0.5, 0.3), 10) == [(0.5, 0.3125)]
    assert passed_pairs(lambda progress: (0.5, 0.3), 10, grid=None) == [(0.5, 0.3)]
    with pytest.raises(ConfigError, match=r"late_error returned .*beta is 1\.02"):
        passed_pairs(late_error, 20)
    with pytest.raises(ConfigError, match=r"rising.* for each function.*SCHEDULE\.KIND"):
        passed_pairs(partial(rising, 3), 20)
