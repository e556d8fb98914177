"""Defects of other reversible or memory-saving networks; each test shows that ours has it not."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dr2net_d2.core import Coefficients, CoefficientSchedule, ReversibleSequence
from dr2net_d2.core.vit import DropPath
from tests.core.stacks import record_states, relative_error, run, stack, tokens
from tests.core.test_vit import features, small_vit


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_openpoints_position_embedding_gets_its_gradient(monkeypatch):
    """Theirs is added before every block, not removed on inversion, and never trained."""
    vit, x = small_vit(), tokens(2, 3, 64, 48)
    vit.coefficients.set(0.5, 0.5)
    forward, backward = record_states(monkeypatch)
    found = gradients(vit, lambda: features(vit, x).square().sum())
    assert all(map(torch.equal, forward, reversed(backward)))
    assert found["pos_embed"].abs().sum() > 0
    vit.reversible = False
    reference = gradients(vit, lambda: features(vit, x).square().sum())
    assert relative_error(found, reference) < 1e-6


def test_openpoints_evaluates_with_the_coefficients_of_mid_schedule():
    """Theirs are those of the schedule's end."""
    vit, x = small_vit(), tokens(2, 3, 64, 64)
    schedule = CoefficientSchedule(start_beta=0.0, end_beta=1.0, duration=1.0)
    vit.coefficients.set(*schedule(0.5))
    trained = features(vit, x)
    with torch.no_grad():
        torch.testing.assert_close(features(vit.eval(), x), trained, rtol=1e-5, atol=1e-5)
        vit.coefficients.set(*schedule(1.0))
        assert (features(vit, x) - trained).abs().max() > 0.1


def test_openpoints_and_re2tal_drop_path_masks_change_every_iteration():
    """Theirs follow from one seed, drawn at construction."""
    vit, x = small_vit(drop_path_rate=0.4), tokens(8, 3, 64, 64)
    vit.coefficients.set(0.5, 0.5)
    vit(x)  # measures the streams first
    masks, iterations = [], []
    for module in vit.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(
                lambda _, __, out: masks.append((out.flatten(1) != 0).any(1))
            )
    for _ in range(3):
        masks.clear()
        vit(x)["last_feat"].sum().backward()
        forward, recomputed = torch.stack(masks).chunk(2)
        assert torch.equal(forward, recomputed.flip(0))
        iterations.append(forward)
    assert not any(torch.equal(iterations[i], iterations[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_re2tal_global_random_stream_is_not_clobbered():
    """Theirs is seeded anew in every forward."""
    sequence = stack(12, dropout=0.3)
    run(sequence, tokens(2, 5, 8))
    after = torch.rand(4)
    sequence.reversible = False
    run(sequence, tokens(2, 5, 8))
    assert torch.equal(torch.rand(4), after)


def test_re2tal_backward_restores_autocast():
    """Theirs, where recomputation overlaps the gradient, runs without the forward's autocast."""
    sequence = stack(12)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = sequence(tokens(2, 5, 8))
        assert out.dtype == torch.float32
        return out.square().sum()

    found = gradients(sequence, loss)
    sequence.reversible = False
    assert relative_error(found, gradients(sequence, loss)) < 1e-6


@pytest.mark.parametrize("frozen", [0, 3, 11])
def test_minrev_frozen_stem_leaves_gradients_to_the_rest(frozen):
    """There no block's parameters get any where the input needs none, silently."""
    sequence = stack(12)
    for index in range(frozen):
        sequence[index].requires_grad_(False)
    found = gradients(sequence, lambda: sequence(tokens(2, 5, 8)).square().sum())
    assert len(found) == 6 * (12 - frozen)
    sequence.reversible = False
    reference = gradients(sequence, lambda: sequence(tokens(2, 5, 8)).square().sum())
    assert relative_error(found, reference) < 1e-6


def test_minrev_find_unused_parameters_under_ddp(tmp_path):
    """There: "mark a variable ready only once". ``test_distributed`` has two ranks."""
    sequence, x = stack(6), tokens(2, 5, 8)
    reference = run(sequence, x)[1]
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", world_size=1, rank=0)
    try:
        model = DistributedDataParallel(sequence, find_unused_parameters=True)
        for _ in range(2):
            found = run(model, x)[1]
    finally:
        dist.destroy_process_group()
    found = {name.removeprefix("module."): gradient for name, gradient in found.items()}
    assert relative_error(found, reference) < 1e-6


def test_minrev_outer_bf16_autocast():
    """Theirs crashes. Here the backward, too, runs inside the region."""
    sequence = stack(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(sequence, lambda: sequence(tokens(2, 5, 8)).square().sum())
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    sequence.reversible = False
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        reference = gradients(sequence, lambda: sequence(tokens(2, 5, 8)).square().sum())
    assert relative_error(found, reference) < 1e-6


@pytest.mark.parametrize(("training", "dropout"), [(True, 0.0), (False, 0.3)])
def test_minrev_generators_untouched_in_training_and_eval(training, dropout):
    """Theirs are seeded anew, nondeterministically, in evaluation as well."""
    sequence = stack(6, dropout=dropout).train(training)

    def generators():
        return (
            torch.initial_seed(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )

    before = generators()
    sequence(tokens(2, 5, 8)).sum().backward()
    with torch.no_grad():
        sequence(tokens(2, 5, 8))
    assert generators() == before


def test_memcnn_rng_replay_is_on_by_default():
    sequence = stack(12, dropout=0.3)
    out, found = run(sequence, tokens(2, 5, 8))
    sequence.reversible = False
    oracle, reference = run(sequence, tokens(2, 5, 8))
    assert torch.equal(out, oracle)
    assert relative_error(found, reference) < 1e-6


def linear_dtypes(sequence, dtype):
    """What the linear layers give in an autocast forward, and in the recomputation after it."""
    given = []
    for module in sequence.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, out: given.append(out.dtype))
    with torch.autocast("cpu", dtype=dtype):
        sequence(tokens(2, 5, 8))
        given.clear()
        loss = sequence(tokens(2, 5, 8)).sum()
    forward = list(given)
    loss.backward()
    return forward, given[len(forward) :]


def test_memcnn_amp_is_not_forced_to_float32():
    forward, _ = linear_dtypes(stack(3), torch.bfloat16)
    assert forward == [torch.bfloat16] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fairscale_recompute_keeps_the_outer_autocast_dtype(dtype):
    """Theirs, which is Detectron2's ``use_act_checkpoint``, recomputes in float16 always."""
    _, recomputed = linear_dtypes(stack(3), dtype)
    assert recomputed == [dtype] * 6


def test_memcnn_batchnorm_statistics_updated_once():
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)]
    sequence = ReversibleSequence(functions, Coefficients(0.5, 0.5))
    oracle = copy.deepcopy(sequence)
    oracle.reversible = False
    for network in (sequence, oracle):
        run(network, tokens(32, 8))
    for function, other in zip(sequence.children(), oracle.children(), strict=True):
        for buffer, expected in zip(function.buffers(), other.buffers(), strict=True):
            assert torch.equal(buffer, expected)
    assert sequence[0][1].num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_revlib_amp(dtype):
    """A few iterations with autocast and a scaler end with the weights of plain autograd."""
    weights = []
    for reversible in (True, False):
        sequence = stack(6, dropout=0.1, reversible=reversible)
        optimizer = torch.optim.AdamW(sequence.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
                loss = sequence(tokens(2, 5, 8)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(torch.cat([p.detach().flatten() for p in sequence.parameters()]))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in stack(6).parameters()]))
