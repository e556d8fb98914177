"""Counters of memory against cases worked out by hand."""

import os
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dr2net_d2.core.memory import (
    assign,
    available_memory_bytes,
    count_saved_bytes,
    labelled,
    peak_tensor_bytes,
)
from tests.core.stacks import stack, tokens

N = 4 * 1000  # bytes of 1000 floats


@pytest.fixture
def ab():
    return torch.ones(1000), torch.ones(1000)


def test_temporaries_count_until_they_are_freed(ab):
    a, b = ab
    with peak_tensor_bytes() as live:
        c = a + b
        assert (live.now, live.peak) == (N, N)
        # The sum lives until the product is there.
        d = (a + b) * c
        assert (live.now, live.peak) == (2 * N, 3 * N)
        del c
        assert (live.now, live.peak) == (N, 3 * N)
    del d
    assert (live.now, live.peak) == (0, 3 * N)


def test_in_place_ops_and_what_lived_before_do_not_count(ab):
    a, b = ab
    with peak_tensor_bytes() as live:
        a.add_(b).mul_(2)
        assert live.peak == 0
        torch.add(a, b, out=b)
        assert live.peak == 0
        c = a + b
        c.mul_(2)
        assert (live.now, live.peak) == (N, N)


def test_a_storage_counts_once_and_as_long_as_a_view_lives(ab):
    a, b = ab
    with peak_tensor_bytes() as live:
        row = a.view(10, 100)[0]
        assert live.peak == 0
        c = a + b
        row = c.view(10, 100)[0]
        assert (live.now, live.peak) == (N, N)
        del c
        assert live.now == N
        del row
        assert live.now == 0


def test_a_resized_result_counts_at_its_new_size(ab):
    a, b = ab
    with peak_tensor_bytes() as live:
        out = torch.empty(0)
        torch.add(a, b, out=out)
        assert (live.now, live.peak) == (N, N)
        del out
        assert live.now == 0


def test_dtypes_have_their_sizes(ab):
    with peak_tensor_bytes() as live:
        half, mask, double = ab[0].half(), ab[0] > 0, ab[0].double()
        assert live.now == N // 2 + N // 4 + 2 * N
    del half, mask, double


def mlp_step(batch=8, wide=50, narrow=10, count=peak_tensor_bytes):
    """Forward and backward of x -> W1 -> ReLU -> W2, with gradients allocated before."""
    model = nn.Sequential(
        nn.Linear(narrow, wide, bias=False), nn.ReLU(), nn.Linear(wide, narrow, bias=False)
    )
    x, grad = torch.ones(batch, narrow), torch.ones(batch, narrow)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with count() as live:
        y = model(x)
        forward = live.now, live.peak
        y.backward(grad)
        return forward, (live.now, live.peak)


def test_forward_and_backward_of_an_mlp():
    forward, backward = mlp_step()
    hidden, out, weight = 4 * 8 * 50, 4 * 8 * 10, 4 * 10 * 50
    # z = x W1, then relu(z), which is saved; z is freed, y = relu(z) W2 comes.
    assert forward == (hidden + out, 2 * hidden)
    # y, relu(z); the gradients of W2 and relu(z); W2's is added to .grad and freed; then that of z,
    # after which the one of relu(z) and relu(z) go; then that of W1.
    peak = out + hidden + max(weight + hidden, 2 * hidden)
    assert backward == (out, peak)


def test_fake_tensors_give_the_same_counts():
    real = mlp_step()
    with FakeTensorMode():
        assert mlp_step() == real


def test_the_count_repeats():
    assert mlp_step() == mlp_step()


@pytest.mark.parametrize("fake", [False, True])
def test_saved_bytes_without_the_weights(fake):
    def saved():
        model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 10))
        with count_saved_bytes(exclude=model.parameters()) as counted:
            y = model(torch.ones(8, 10))
        assert y.shape == (8, 10)
        return counted.total

    if fake:
        with FakeTensorMode():
            total = saved()
    else:
        total = saved()
    # x of the first layer; relu(z), for itself and for the second layer.
    assert total == 4 * 8 * (10 + 50)


def test_a_result_that_its_own_op_saves_is_freed_with_the_graph():
    freed = []
    x = torch.ones(3, requires_grad=True)
    with count_saved_bytes() as saved:
        y = (2 * x).exp()
    weakref.finalize(y.untyped_storage(), freed.append, True)
    assert saved.total == y.nbytes
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x).exp())
    with count_saved_bytes():
        z = (2 * x).softmax(0)
    weakref.finalize(z.untyped_storage(), freed.append, True)
    del y, z, saved
    assert freed == [True, True]


def test_labels_reach_the_innermost_counter(ab):
    a, b = ab
    with peak_tensor_bytes() as outer, labelled("outer"):
        c = a + b
        with peak_tensor_bytes() as inner, labelled("inner"):
            d = a + b
            with labelled("nested"):
                e = a + b
            assign([d], "assigned")
        f = a + b
    assert inner.parts == {"inner": 0, "nested": N, "assigned": N}
    assert outer.parts == {"outer": 4 * N}
    del c, d, e, f


def test_labels_do_nothing_where_nothing_is_counted(ab):
    a, b = ab
    with labelled("unseen"):
        c = a + b
    assign([c], "unseen")
    with peak_tensor_bytes() as live:
        d = a + b
    assert live.parts == {"": N}
    del d


@pytest.mark.parametrize(("beta", "bits"), [(1.0, 0), (0.5, 1), (0.375, 3)])
def test_a_stack_labels_its_remainder_bits(beta, bits):
    sequence = stack(4, beta)
    with peak_tensor_bytes() as live:
        out = sequence(tokens(2, 4, 8))
        assert live.parts.get("remainder bits", 0) == 4 * 2 * 4 * 8 * bits / 8
        assert live.parts["streams"] > 2 * out.nbytes
        out.sum().backward()
        del out
    assert live.parts.get("remainder bits", 0) == 0


def test_a_stack_at_beta_0_keeps_streams_and_no_bits():
    sequence = stack(4, 0.0)
    with peak_tensor_bytes() as live:
        out = sequence(tokens(2, 4, 8))
        assert "remainder bits" not in live.parts
        assert live.parts["streams"] >= 6 * out.nbytes


def test_what_is_available_is_part_of_the_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory_bytes(torch.device("cpu")) <= total
