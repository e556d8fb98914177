"""Functions of many kinds, hooks on them, losses on inner values."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dr2net_d2.core import Coefficients, ReversibleSequence
from tests.core.stacks import mlp, relative_error, run, stack, tokens


def coupled(*functions, beta=0.5, **options):
    return ReversibleSequence(functions, Coefficients(1 - beta, beta), **options)


def oracle_of(sequence):
    """The same modules in the same state, storing everything."""
    oracle = copy.deepcopy(sequence)
    oracle.reversible = False
    return oracle


def assert_equals_oracle(sequence, x, oracle=None):
    """Output, gradients and buffers of one pass are those of plain autograd; returns gradients."""
    oracle = oracle or oracle_of(sequence)
    out, gradients = run(sequence, x)
    expected, reference = run(oracle, x)
    assert torch.equal(out, expected)
    assert relative_error(gradients, reference) <= 1e-6
    for (name, buffer), other in zip(sequence.named_buffers(), oracle.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    return gradients


def log_calls(sequence):
    """A list that fills with the index of every function that is called, recomputed ones too."""
    calls = []
    for index in range(len(sequence)):
        sequence[index].register_forward_hook(lambda *_, index=index: calls.append(index))
    return calls


class Lora(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def test_low_rank_adapters_on_a_frozen_network():
    torch.manual_seed(0)
    adapted = [nn.Sequential(nn.LayerNorm(8).requires_grad_(False), Lora(nn.Linear(8, 8)))
               for _ in range(6)]  # fmt: skip
    gradients = assert_equals_oracle(coupled(*adapted), tokens(2, 5, 8))
    assert gradients.keys() == {"x", *(f"{i}.1.{n}" for i in range(6) for n in "ab")}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrized_weights(parametrize):
    """Spectral norm's power iteration moves its vectors in each forward: once, not twice."""
    torch.manual_seed(0)
    functions = [nn.Sequential(parametrize(nn.Linear(8, 8)), nn.GELU()) for _ in range(4)]
    sequence = coupled(*functions)
    before = copy.deepcopy(dict(sequence.named_buffers()))
    assert_equals_oracle(sequence, tokens(2, 5, 8))
    moved = [n for n, b in sequence.named_buffers() if "_u" in n and not torch.equal(b, before[n])]
    assert len(moved) == (4 if parametrize is parametrizations.spectral_norm else 0)


def with_batch_norm(steps, **options):
    torch.manual_seed(0)
    functions = [
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 8))
        for _ in range(steps)
    ]
    return coupled(*functions, **options)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_batch_norm_counts_a_batch_once(arithmetic):
    """memcnn and torch's checkpoint update the running statistics twice."""
    sequence = with_batch_norm(4, beta=1.0, arithmetic=arithmetic)
    assert_equals_oracle(sequence, tokens(32, 8))
    assert all(function[1].num_batches_tracked == 1 for function in sequence.children()
               if isinstance(function, nn.Sequential))  # fmt: skip


def test_batch_norm_counts_a_batch_once_when_an_overflow_repeats_the_pass():
    sequence = with_batch_norm(4)
    assert_equals_oracle(sequence, tokens(32, 8))
    assert_equals_oracle(sequence, 1000 * tokens(32, 8))
    assert sequence.overflows == 1
    assert sequence[3][1].num_batches_tracked == 2


class Closure(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_tensors_that_come_through_a_closure():
    """A leaf that no function has registered, and a tensor that is computed before the stack."""
    leaf, logits = tokens(8, 8, seed=5).requires_grad_(), tokens(8, seed=6).requires_grad_()

    def gradients(reversible):
        gates = logits.sigmoid()
        functions = [Closure(lambda x: (x @ leaf).tanh() * gates) for _ in range(4)]
        sequence = coupled(*functions, reversible=reversible)
        loss = sequence(tokens(2, 5, 8)).square().sum()
        return dict(zip("lg", torch.autograd.grad(loss, (leaf, logits)), strict=True))

    assert relative_error(gradients(True), gradients(False)) <= 1e-6


def test_gradients_asked_for_one_by_one():
    sequence = stack(6)
    oracle = oracle_of(sequence)
    x, weights = tokens(2, 5, 8).requires_grad_(), [sequence[0][1].weight, sequence[4][4].bias]
    reference = run(oracle, x.detach())[1]

    def ask(inputs):
        out = sequence(x)
        return torch.autograd.grad((out * tokens(*out.shape, seed=4)).sum(), inputs)

    torch.testing.assert_close(ask(x)[0], reference["x"])
    for found, name in zip(ask(weights), ["0.1.weight", "4.4.bias"], strict=True):
        torch.testing.assert_close(found, reference[name])
    assert all(parameter.grad is None for parameter in sequence.parameters())


def test_a_function_of_another_shape_is_named():
    with pytest.raises(
        ValueError, match=r"step 2 \(Linear 1\) returned \(2, 5, 3\) .* \(2, 5, 8\)"
    ):
        coupled(mlp(), nn.Linear(8, 3))(tokens(2, 5, 8))


def test_a_function_that_changes_its_input_is_named():
    with pytest.raises(ValueError, match=r"step 2 \(Sequential 1\) changes its input in place"):
        coupled(mlp(), nn.Sequential(nn.ReLU(inplace=True), mlp()))(tokens(2, 5, 8))


def test_no_tokens():
    out, gradients = run(stack(2), tokens(0, 5, 8))
    assert out.shape == (0, 5, 8) and len(gradients) == 13
    assert not any(gradient.any() for gradient in gradients.values())


class ReadsTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
        return grad * (first + second).div(2).exp()


def test_a_saved_tensor_that_is_read_twice_is_an_error_naming_the_step():
    sequence = coupled(mlp(), Closure(ReadsTwice.apply))
    with pytest.raises(RuntimeError, match=r"step 2 \(Closure 1\): a saved tensor was read twice"):
        sequence(0.1 * tokens(2, 5, 8)).sum().backward()


def with_inner_loss(sequence):
    """(main, auxiliary) losses, the second on what a function in the middle gives."""
    kept = []
    handle = sequence[3].register_forward_hook(lambda _, args, out: kept.append(out))
    out = sequence(tokens(2, 5, 8))
    handle.remove()
    return out.square().sum(), kept[-1].tanh().sum()


def test_a_loss_on_an_inner_value():
    def gradients(sequence):
        main, auxiliary = with_inner_loss(sequence)
        (main + 3 * auxiliary).backward()
        return {name: p.grad for name, p in sequence.named_parameters()}

    sequence = stack(6)
    assert relative_error(gradients(sequence), gradients(oracle_of(sequence))) <= 1e-6


def test_an_inner_loss_of_its_own_is_an_error_and_the_main_one_still_works():
    sequence = stack(6)
    main, auxiliary = with_inner_loss(sequence)
    with pytest.raises(RuntimeError, match=r"step 4 \(Sequential 3\) are not at hand"):
        auxiliary.backward(retain_graph=True)
    sequence.zero_grad()
    main.backward()
    found = {name: p.grad.clone() for name, p in sequence.named_parameters()}
    sequence.zero_grad()
    with_inner_loss(sequence)[0].backward()
    assert all(torch.equal(found[name], p.grad) for name, p in sequence.named_parameters())


def test_forward_hooks_fire_at_the_forward_and_at_the_recomputation():
    sequence = stack(4)
    sequence.stream_range.widen(8.0)  # else the first pass is preceded by a measuring one
    calls = log_calls(sequence)
    out = sequence(tokens(2, 5, 8))
    assert calls == [0, 1, 2, 3]
    out.sum().backward()
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]
    with torch.no_grad():
        sequence(tokens(2, 5, 8))
    assert calls[8:] == [0, 1, 2, 3]


def test_forward_hooks_may_change_input_and_output():
    sequence = stack(4)
    sequence[1].register_forward_pre_hook(lambda _, args: (2 * args[0].tanh(),))
    sequence[2].register_forward_hook(lambda _, args, out: out * args[0].sigmoid())
    assert_equals_oracle(sequence, tokens(2, 5, 8))


def backward_hooks(sequence):
    """What full backward hooks, their pre-hooks and hooks on weights see in one training step."""
    seen = {}

    def note(key):
        return seen.setdefault(key, []).append

    for index in range(len(sequence)):
        module = sequence[index]
        into, out, weight = (note(f"{kind} {index}") for kind in ("in", "out", "weight"))
        module.register_full_backward_hook(lambda _, grads, __, note=into: note(grads[0]))
        module.register_full_backward_pre_hook(lambda _, grads, note=out: note(grads[0]))
        module[1].weight.register_hook(weight)
    run(sequence, tokens(2, 5, 8))
    return seen


def test_backward_hooks_fire_once_with_the_gradients_of_plain_autograd():
    sequence = stack(4)
    oracle = oracle_of(sequence)
    seen, expected = backward_hooks(sequence), backward_hooks(oracle)
    assert len(seen) == 12 and all(len(values) == 1 for values in seen.values())
    assert relative_error(*({n: v[0] for n, v in each.items()} for each in (seen, expected))) < 1e-6


def test_gradients_of_late_functions_are_ready_before_early_ones_are_recomputed():
    """An optimizer step inside the backward, and DDP's overlap, need that."""
    sequence = stack(6)
    run(sequence, tokens(2, 5, 8))
    oracle, events = copy.deepcopy(sequence), log_calls(sequence)
    learning_rate = 0.01

    def update(parameter):
        events.append(next(n for n, p in sequence.named_parameters() if p is parameter))
        parameter.data -= learning_rate * parameter.grad
        parameter.grad = None

    for parameter in sequence.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(update)
    sequence(tokens(2, 5, 8)).square().sum().backward()
    backward = events[6:]
    for index in range(6):
        start = backward.index(5 - index)
        assert {str(name)[:2] for name in backward[start + 1 : start + 7]} == {f"{5 - index}."}
    oracle.zero_grad()
    oracle(tokens(2, 5, 8)).square().sum().backward()
    for parameter, other in zip(sequence.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - learning_rate * other.grad)
