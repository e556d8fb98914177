"""Copies, pickles and checkpoints of a stack, and the coefficients of its functions."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.core.stacks import mlp, relative_error, run, stack, tokens
from tests.core.test_vit import small_vit


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_copies_keep_everything(duplicate):
    for sequence, x in [
        (stack(4, 0.25, dropout=0.2, output="mean"), tokens(2, 5, 8)),
        (small_vit(depth=2, drop_path_rate=0.3).blocks, tokens(1, 8, 8, 32)),
    ]:
        sequence.coefficients.set(0.625, 0.25)
        run(sequence, x)
        twin = duplicate(sequence)
        assert twin.coefficients.values == (0.625, 0.25)
        assert twin.fraction_bits == sequence.fraction_bits
        assert twin.stream_range.measured
        (out, gradients), (other, others) = run(sequence, x), run(twin, x)
        assert torch.equal(out, other) and relative_error(gradients, others) == 0
        sequence.coefficients.set(0.5, 0.5)
        assert twin.coefficients.values == (0.625, 0.25)


def test_coefficients_of_each_function_against_plain_autograd_and_float64():
    sequence = stack(5)
    sequence.coefficients.set([1.0, 0.9, 0.3, 0.0, 0.5], [0.0, 0.0625, 0.6875, 1.0, 0.375])
    _, gradients = run(sequence, tokens(2, 5, 8))
    sequence.reversible = False
    assert relative_error(gradients, run(sequence, tokens(2, 5, 8))[1]) <= 1e-6
    double = copy.deepcopy(sequence).double()
    double.arithmetic = "float"
    _, reference = run(double, tokens(2, 5, 8, dtype=torch.float64))
    assert relative_error(gradients, reference) < 1e-5


def test_a_list_of_coefficients_of_the_wrong_length_names_both():
    sequence = stack(5)
    sequence.coefficients.set([0.5] * 4, [0.5] * 4)
    with pytest.raises(ValueError, match="4 pairs of coefficients for 5 functions"):
        sequence(tokens(2, 5, 8))


@pytest.mark.parametrize(("alpha", "beta"), [(0.625, 0.375), ([0.5, 0.75], [0.5, 0.25])])
@pytest.mark.parametrize("before", [0.5, [0.25, 1.0]])
def test_a_final_state_dict_evaluates_with_the_trained_coefficients(alpha, beta, before):
    """One pair for all or one per function, into a stack that has the one or the other."""
    trained, fresh = stack(2), stack(2, seed=9)
    trained.coefficients.set(alpha, beta)
    trained(tokens(2, 5, 8)).sum().backward()
    fresh.coefficients.set(before, before)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.coefficients.values == trained.coefficients.values
    with torch.no_grad():
        assert torch.equal(fresh(tokens(2, 5, 8)), trained(tokens(2, 5, 8)))


def test_a_state_dict_of_the_plain_network_loads_strictly():
    sequence = stack(2, 0.25)
    plain = nn.Sequential(mlp(), mlp())
    sequence.load_state_dict(plain.state_dict())
    assert sequence.coefficients.values == (0.75, 0.25)
    assert torch.equal(sequence[1][4].weight, plain[1][4].weight)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.4.bias"'):
        sequence.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "1.4.bias"})


def test_evaluation_in_mid_schedule_uses_the_current_coefficients():
    """A published alpha/beta point-cloud ViT evaluates with the final ones."""
    sequence = stack(6, 0.0)
    for beta in (0.25, 0.75):
        sequence.coefficients.set(1 - beta, beta)
        out, _ = run(sequence, tokens(2, 5, 8))
        with torch.no_grad():
            torch.testing.assert_close(sequence(tokens(2, 5, 8)), out, rtol=1e-5, atol=1e-6)
