"""What stops a training, on tensors whose finiteness is plain to see."""

import math

import pytest
import torch
from torch import nn

from dr2net_d2.training.guards import check_gradients, check_losses, divergence_at, non_finite


def test_non_finite_tensors_are_named_in_their_order():
    tensors = {
        "fine": torch.ones(3),
        "minus infinity": torch.tensor([1.0, -math.inf]),
        "scalar": torch.tensor(2.0),
        "half": torch.tensor([[1.0], [math.nan]], dtype=torch.float16),
        "weight": nn.Parameter(torch.tensor([math.nan, math.inf])),
    }
    assert non_finite(tensors) == ["minus infinity", "half", "weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_finite(dtype):
    """Their sum of squares, and their sum, are not."""
    assert non_finite({"large": torch.full((9,), torch.finfo(dtype).max, dtype=dtype)}) == []


def small_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    model(torch.randn(5, 4)).sum().backward()
    return model


def test_gradients_that_are_finite_pass():
    check_gradients(small_model())


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: nn.ModuleDict({"module": model})]
)
def test_the_parameter_that_the_backward_met_first_is_named(wrap):
    model = small_model()
    for name, value in (("0.bias", math.nan), ("1.weight", -math.inf)):
        model.get_parameter(name).grad.flatten()[2] = value
    with pytest.raises(FloatingPointError) as caught:
        check_gradients(wrap(model))
    assert str(caught.value) == (
        "the gradient of 1.weight is -inf in 1 of 6 elements, the first that the backward met of "
        "2 non-finite among 5 gradients; the weights are still those of the iteration before"
    )


def test_losses():
    losses = {"cls": torch.tensor(1.5), "box": torch.tensor(0.25, requires_grad=True) * 2}
    assert check_losses(losses) == {"cls": 1.5, "box": 0.5}
    losses |= {"mask": torch.tensor(math.inf), "total": torch.tensor(math.nan)}
    with pytest.raises(FloatingPointError, match=r"not finite \(mask inf, total nan\)"):
        check_losses(losses)


def test_the_iteration_and_a_remedy_are_added_to_this_error_alone():
    message = r"^iteration 7: It diverged; lower SOLVER\.BASE_LR"
    with pytest.raises(FloatingPointError, match=message), divergence_at(7):
        raise FloatingPointError("It diverged.")
    with pytest.raises(ValueError, match=r"^other$"), divergence_at(7):
        raise ValueError("other")
