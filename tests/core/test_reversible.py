"""The reversible backward against plain autograd, float64, and the states themselves."""

import copy
import gc

import pytest
import torch
from torch import nn

from dr2net_d2.core import Coefficients, ReversibleSequence
from dr2net_d2.core.coupling import error_growth
from dr2net_d2.core.memory import peak_tensor_bytes
from tests.core.stacks import BETAS, mlp, record_states, relative_error, run, stack, tokens


@pytest.mark.parametrize("beta", [0.0, *BETAS])
@pytest.mark.parametrize("steps", [1, 24, 96])
def test_every_state_is_recovered_bit_for_bit(monkeypatch, steps, beta):
    sequence = stack(steps, beta)
    forward, backward = record_states(monkeypatch)
    run(sequence, tokens(2, 5, 8))
    assert len(forward) == len(backward) == steps
    assert all(map(torch.equal, forward, reversed(backward)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_states_are_recovered_at_any_alpha(monkeypatch, alpha):
    sequence = stack(12)
    sequence.coefficients.set(alpha, 3 / 16)
    forward, backward = record_states(monkeypatch)
    run(sequence, tokens(2, 5, 8))
    assert all(map(torch.equal, forward, reversed(backward)))


@pytest.mark.parametrize("options", [{}, {"first_state": "zero"}, {"output": "mean"}])
@pytest.mark.parametrize("beta", [0.0, *BETAS])
def test_reversible_equals_plain_autograd(beta, options):
    sequence = stack(24, beta, **options)
    out, gradients = run(sequence, tokens(2, 5, 8))
    sequence.reversible = False
    oracle, reference = run(sequence, tokens(2, 5, 8))
    assert torch.equal(out, oracle)
    assert relative_error(gradients, reference) < 1e-6


@pytest.mark.parametrize("beta", [0.0, *BETAS])
def test_gradients_are_as_good_as_float32_training(beta):
    sequence = stack(48, beta)
    _, gradients = run(sequence, tokens(2, 5, 8))
    sequence.reversible, sequence.arithmetic = False, "float"
    _, plain = run(sequence, tokens(2, 5, 8))
    _, reference = run(copy.deepcopy(sequence).double(), tokens(2, 5, 8, dtype=torch.float64))
    assert relative_error(gradients, reference) <= 1.5 * relative_error(plain, reference)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"first_state": "zero"}, {"output": "mean"}])
def test_gradcheck(beta, options):
    sequence = stack(3, beta, dim=4, arithmetic="float", **options).double()
    # A view of every other column: not contiguous.
    x = tokens(2, 3, 8, dtype=torch.float64).requires_grad_()
    parameters = list(sequence.parameters())

    def function(x, *_):
        return sequence(x[..., ::2])

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_float_arithmetic_is_exactly_plain_autograd_where_it_is_stable():
    sequence = stack(24, 1.0, arithmetic="float").double()
    x = tokens(2, 5, 8, dtype=torch.float64)
    _, gradients = run(sequence, x)
    sequence.reversible = False
    _, reference = run(sequence, x)
    assert relative_error(gradients, reference) < 1e-12


def test_float_arithmetic_is_wrong_where_the_paper_starts_and_says_so():
    sequence = stack(24, 0.1, arithmetic="float")
    sequence.coefficients.set(1.0, 0.1)
    with pytest.warns(UserWarning, match=r"10\.9x per step \(alpha 1, beta 0\.1, 24 steps\)"):
        _, gradients = run(sequence, tokens(2, 5, 8))
    sequence.reversible = False
    _, reference = run(sequence, tokens(2, 5, 8))
    assert not relative_error(gradients, reference) < 0.1
    sequence.reversible, sequence.arithmetic = True, "exact"
    sequence.coefficients.set(1.0, 0.125)
    _, gradients = run(sequence, tokens(2, 5, 8))
    sequence.reversible = False
    assert relative_error(gradients, run(sequence, tokens(2, 5, 8))[1]) < 1e-6


def test_error_growth_by_hand():
    # The positive root of 0.1 r^2 + r - 1 is 5 (sqrt(1.4) - 1); its partner has the larger modulus.
    assert error_growth(1, 0.1) == pytest.approx(5 * (1.4**0.5 + 1))
    assert error_growth(0.75, 0.25) == pytest.approx(4)
    assert error_growth(0, 1) == 1
    assert error_growth(1, 0) == float("inf")


def test_inference_agrees_and_stores_nothing():
    sequence = stack(24, 0.5)
    out, _ = run(sequence, tokens(2, 5, 8))
    with torch.no_grad():
        torch.testing.assert_close(sequence(tokens(2, 5, 8)), out, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(sequence(tokens(2, 5, 8)), out, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_for_frozen_steps(monkeypatch):
    sequence = stack(12)
    for index in range(6):
        sequence[index].requires_grad_(False)
    _, backward = record_states(monkeypatch)
    sequence(tokens(2, 5, 8)).sum().backward()
    assert len(backward) == 6


def test_frozen_everything_but_norms_and_shared_parameters():
    shared = mlp()
    sequence = ReversibleSequence([shared, mlp(), shared], Coefficients(0.5, 0.5))
    for name, parameter in sequence.named_parameters():
        parameter.requires_grad_(name.endswith(("0.weight", "0.bias")))
    _, gradients = run(sequence, tokens(2, 5, 8))
    sequence.reversible = False
    assert relative_error(gradients, run(sequence, tokens(2, 5, 8))[1]) < 1e-6


def test_gradients_accumulate():
    sequence = stack(8)
    once = run(sequence, tokens(2, 5, 8))[1]
    x = tokens(2, 5, 8)
    for _ in range(2):
        out = sequence(x)
        (out * tokens(*out.shape, seed=4)).sum().backward()
    for name, parameter in sequence.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * once[name])


def test_two_backwards_through_one_graph():
    sequence = stack(8)
    loss = sequence(tokens(2, 5, 8)).square().sum()
    parameters = list(sequence.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_gradients_of_late_parameters_only():
    sequence = stack(8)
    late = list(sequence[6].parameters())
    loss = sequence(tokens(2, 5, 8)).square().sum()
    some = torch.autograd.grad(loss, late, retain_graph=True)
    loss.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(some, late, strict=True))


def test_coefficients_may_change_between_forward_and_backward():
    sequence = stack(8, 0.25)
    reference = run(sequence, tokens(2, 5, 8))[1]
    sequence.zero_grad()
    out = sequence(tokens(2, 5, 8))
    sequence.coefficients.set(0.0, 1.0)
    (out * tokens(*out.shape, seed=4)).sum().backward()
    for name, parameter in sequence.named_parameters():
        assert torch.equal(parameter.grad, reference[name])


class Unsteady(nn.Module):
    """Gives another value each time it is called."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.weight * (1 + 1e-3 * self.calls)


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
def test_a_recomputation_that_differs_is_an_error_naming_the_step(beta):
    functions = [mlp(), Unsteady(8), mlp()]
    sequence = ReversibleSequence(functions, Coefficients(1 - beta, beta))
    loss = sequence(tokens(2, 5, 8)).sum()
    with pytest.raises(RuntimeError, match=r"step 2 \(Unsteady 1\) gave another value"):
        loss.backward()


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_failed_backward_is_freed_with_its_graph(arithmetic):
    """As after running out of memory: no reference cycle has to wait for the garbage collector."""
    sequence = stack(6, arithmetic=arithmetic)
    sequence(tokens(2, 5, 8))

    def fail(*_):
        raise KeyError("out of memory")

    gc.disable()
    try:
        with peak_tensor_bytes() as live:
            loss = sequence(tokens(2, 5, 8)).sum()
            sequence[3][4].register_forward_hook(fail)  # of the recomputation
            with pytest.raises(KeyError, match="out of memory"):
                loss.backward()
            sequence.zero_grad()
            assert live.now > 0
            del loss
            assert live.now == 0
    finally:
        gc.enable()


def test_overflow_repeats_the_pass_with_fewer_bits(caplog):
    sequence = stack(6, dropout=0.2)
    run(sequence, tokens(2, 5, 8))
    bits = sequence.fraction_bits
    out, gradients = run(sequence, 1000 * tokens(2, 5, 8))
    assert sequence.overflows == 1 and sequence.fraction_bits < bits
    assert "outgrew" in caplog.text
    again, reference = run(sequence, 1000 * tokens(2, 5, 8))
    assert sequence.overflows == 1
    assert torch.equal(out, again)
    assert relative_error(gradients, reference) == 0


class Growing(nn.Module):
    """Gives a hundred times as much each time it is called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 100.0**self.calls


def test_a_pass_that_overflows_again_is_an_error_after_one_repetition(caplog):
    growing = Growing()
    sequence = ReversibleSequence([growing], Coefficients(0.5, 0.5))
    with pytest.raises(OverflowError, match=r"measured to peak at .* but reached .* same values"):
        sequence(tokens(2, 5, 8).requires_grad_())
    assert growing.calls == 4  # measured, attempted, measured, attempted
    assert sequence.overflows == 1
    assert caplog.text.count("is repeated") == 1


def test_the_range_is_measured_anew_when_the_streams_grow_otherwise():
    sequence, resumed = stack(48), stack(48)
    sequence.coefficients.set(1.0, 1 / 8)
    with pytest.warns(UserWarning, match="grow"):
        run(sequence, tokens(2, 5, 8))
    steep = sequence.fraction_bits
    resumed.load_state_dict(sequence.state_dict())
    assert resumed.fraction_bits == steep
    for twin in (sequence, resumed):
        twin.coefficients.set(0.5, 1 / 2)
    out, gradients = run(sequence, tokens(2, 5, 8))
    assert sequence.fraction_bits > steep + 4
    again, reference = run(resumed, tokens(2, 5, 8))
    assert torch.equal(out, again)
    assert relative_error(gradients, reference) == 0


def test_non_finite_streams_are_an_error_naming_the_step():
    sequence = stack(4)
    with torch.no_grad():
        sequence[2][1].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"after step 3 \(Sequential 2\)"):
        sequence(tokens(2, 5, 8))


def test_range_and_coefficients_are_in_the_state_dict():
    source, target = stack(4, 0.25), stack(4, 0.5, seed=9)
    out, _ = run(source, tokens(2, 5, 8))
    target.load_state_dict(source.state_dict())
    assert target.coefficients.values == (0.75, 0.25)
    assert target.fraction_bits == source.fraction_bits
    assert torch.equal(run(target, tokens(2, 5, 8))[0], out)


def test_float64_streams():
    sequence = stack(24, 3 / 16).double()
    x = tokens(2, 5, 8, dtype=torch.float64)
    _, gradients = run(sequence, x)
    sequence.reversible, sequence.arithmetic = False, "float"
    assert relative_error(gradients, run(sequence, x)[1]) < 1e-12


def test_double_backward_is_a_clear_error():
    sequence = stack(2)
    x = tokens(2, 5, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(sequence(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "options", [{"arithmetic": "bf16"}, {"first_state": "none"}, {"output": "sum"}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        stack(2, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64; use one of"):
        stack(2)(torch.ones(2, 5, 8, dtype=torch.int64))
