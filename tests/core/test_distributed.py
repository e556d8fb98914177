"""DistributedDataParallel on two ranks, half a batch each, against one process with all of it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dr2net_d2.core import Coefficients, ReversibleSequence
from tests.core.ranks import (
    RANKS,
    batch,
    gradients,
    input_of,
    loss_on,
    on_two_ranks,
    one_process,
    uneven,
    vit,
)
from tests.core.stacks import relative_error, stack, tokens


def frozen():
    sequence = stack(5)
    sequence[0].requires_grad_(False)
    sequence[2].requires_grad_(False)
    return sequence


def unused():
    sequence = stack(5)
    sequence.never_called = nn.Linear(2, 2)
    return sequence


def train(make, **options):
    """Of the third iteration: DDP has rebuilt its buckets and learnt a static graph."""
    model = DistributedDataParallel(make(), **options)
    x = batch(input_of(model.module))
    for _ in range(3):
        model.zero_grad()
        loss_on(model, x).backward()
    return gradients(model)


def accumulate():
    model = DistributedDataParallel(stack(5))
    first, second = tokens(8, 5, 8).chunk(2)
    with model.no_sync():
        loss_on(model, batch(first)).backward()
    loss_on(model, batch(second)).backward()
    return gradients(model)


def batch_norm(reversible):
    """(gradients, buffers) after two iterations; every rank has statistics of its own half."""
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3)]
    sequence = ReversibleSequence(functions, Coefficients(0.5, 0.5), reversible=reversible)
    model = DistributedDataParallel(sequence)
    for seed in range(2):
        model.zero_grad()
        loss_on(model, batch(tokens(32, 8, seed=seed))).backward()
    return gradients(model), dict(sequence.named_buffers())


def overflow():
    """(gradients, overflows on this rank): the second rank's half outgrows its range."""
    sequence = stack(5)
    model = DistributedDataParallel(sequence)
    loss_on(model, batch(tokens(4, 5, 8))).backward()
    model.zero_grad()
    loss_on(model, batch(uneven())).backward()
    return gradients(model), sequence.overflows


def events_of_a_backward():
    """Recomputations ("F", place from the end) and reductions ("R", bucket) of one backward."""
    sequence, events = stack(8), []
    for index in range(len(sequence)):
        sequence[index].register_forward_hook(
            lambda *_, index=index: events.append(("F", 7 - index))
        )
    bytes_of_a_function = sum(parameter.nbytes for parameter in sequence[0].parameters())
    model = DistributedDataParallel(sequence, bucket_cap_mb=bytes_of_a_function / 2**20)

    def hook(state, bucket):
        events.append(("R", bucket.index()))
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    for _ in range(2):
        events.clear()
        loss = loss_on(model, batch(tokens(4, 5, 8)))
        events.clear()
        loss.backward()
    return events


MODELS = {
    "plain": (partial(stack, 5), {}),
    "find unused": (partial(stack, 5), {"find_unused_parameters": True}),
    "static graph": (partial(stack, 5), {"static_graph": True}),
    "views": (partial(stack, 5), {"gradient_as_bucket_view": True}),
    "frozen": (frozen, {}),
    "frozen, find unused": (frozen, {"find_unused_parameters": True}),
    "unused": (unused, {"find_unused_parameters": True}),
    "vit": (vit, {}),
}
SCENARIOS = {
    **{name: partial(train, make, **opts) for name, (make, opts) in MODELS.items()},
    "no_sync": accumulate,
    "batch norm": partial(batch_norm, reversible=True),
    "batch norm, stored": partial(batch_norm, reversible=False),
    "overflow": overflow,
    "events": events_of_a_backward,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ddp"), SCENARIOS)


@pytest.mark.parametrize("name", MODELS)
def test_ddp_gradients_are_those_of_one_process(results, name):
    """minREV under DDP raises "mark a variable ready only once" with find_unused_parameters."""
    model = MODELS[name][0]()
    reference = one_process(model, input_of(model))
    for rank in range(RANKS):
        assert relative_error(results[rank][name], reference) < 1e-6


def test_ddp_accumulates_gradients(results):
    reference = one_process(stack(5), tokens(8, 5, 8), backwards=2)
    for rank in range(RANKS):
        assert relative_error(results[rank]["no_sync"], reference) < 1e-6


def test_ddp_broadcasts_buffers_that_have_counted_once(results):
    for rank in range(RANKS):
        (found, buffers) = results[rank]["batch norm"]
        (reference, stored) = results[rank]["batch norm, stored"]
        assert relative_error(found, reference) < 1e-6
        assert buffers["0.1.num_batches_tracked"] == 2
        assert all(torch.equal(buffers[name], stored[name]) for name in buffers)


def test_an_overflow_on_one_rank_alone(results):
    """Every rank has its own range, and repeats its own forward without a collective."""
    reference = one_process(stack(5), uneven())
    for rank in range(RANKS):
        found, overflows = results[rank]["overflow"]
        assert overflows == rank
        assert relative_error(found, reference) < 1e-5


def test_ddp_reduces_late_gradients_while_early_functions_are_recomputed(results):
    for rank in range(RANKS):
        events = results[rank]["events"]
        assert events == [(kind, i) for i in range(8) for kind in "FR"]
