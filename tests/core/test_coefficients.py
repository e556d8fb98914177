import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from dr2net_d2.core import Coefficients


def test_dtype_moves_leave_the_values_alone():
    coefficients = Coefficients(0.3, 0.7, grid=None)
    for moved in (coefficients.half(), coefficients.to(torch.bfloat16), coefficients.double()):
        assert moved.alpha.dtype == moved.beta.dtype == torch.float64
        assert (moved.alpha.item(), moved.beta.item()) == moved.values == (0.3, 0.7)


def test_off_grid_beta_is_snapped_and_logged(caplog):
    with caplog.at_level(logging.INFO):
        assert Coefficients().set(0.9, 0.1) == (0.9, 0.125)
    assert "beta 0.1 snapped to 0.125" in caplog.text


@pytest.mark.parametrize(
    ("alpha", "beta", "words"),
    [
        (-0.1, 0.5, ["alpha", "-0.1", "[0, 1]"]),
        (0.5, 1.2, ["beta", "1.2", "[0, 1]"]),
        (float("nan"), 0.5, ["alpha", "nan"]),
        (0.0, 0.0, ["both 0"]),
    ],
)
def test_bad_values_are_refused_and_change_nothing(alpha, beta, words):
    coefficients = Coefficients(0.5, 0.5)
    with pytest.raises(ValueError) as error:
        coefficients.set(alpha, beta)
    assert all(word in str(error.value) for word in words)
    assert coefficients.values == (0.5, 0.5)


def test_state_dict_round_trip_deepcopy_and_pickle():
    source, target = Coefficients(0.25, 0.75), Coefficients()
    target.load_state_dict(source.state_dict())
    assert target.values == (0.25, 0.75)
    assert copy.deepcopy(source).values == pickle.loads(pickle.dumps(source)).values == (0.25, 0.75)


def test_a_plain_state_dict_loads_strictly_and_changes_nothing():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.coefficients = Coefficients(0.25, 0.75)

    network = Network()
    network.load_state_dict({"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)})
    assert network.coefficients.values == (0.25, 0.75)
