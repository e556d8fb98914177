"""When hooks act, and with which values, in training loops of Detectron2 without a detector."""

import contextlib
import itertools
import math
import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from torch import nn

from dr2net_d2.core import Coefficients, CoefficientSchedule, ReversibleSequence
from dr2net_d2.d2 import CoefficientHook, NonFiniteGuard, SeedIterations
from dr2net_d2.d2.hooks import EvalUnlessFailed


class Loop(TrainerBase):
    """Runs only hooks, and records what ``watch`` returns in every iteration."""

    def __init__(self, *hooks: HookBase, model=None, watch=lambda: None):
        super().__init__()
        self.model = model
        self.watch = watch
        self.seen = []
        self.scalars = []
        self.register_hooks(hooks)

    def run_step(self):
        self.seen.append(self.watch())

    def after_step(self):
        super().after_step()
        self.scalars.append(dict(self.storage.latest()))


def stack():
    return ReversibleSequence([nn.Linear(4, 4)], Coefficients())


@pytest.mark.parametrize("start", [0, 3])
def test_coefficients_are_set_before_every_iteration(start, caplog):
    model = nn.Sequential(nn.Linear(4, 4), stack())
    schedule = CoefficientSchedule(start_beta=0, end_beta=1, duration=0.8)
    loop = Loop(
        CoefficientHook(schedule, max_iter=10),
        model=model,
        watch=lambda: model[1].coefficients.values,
    )
    with caplog.at_level("INFO", logger="dr2net_d2"):
        loop.train(start, 10)
    betas = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0][start:]
    assert loop.seen == [(1 - beta, beta) for beta in betas]
    for iteration, (beta, scalars) in enumerate(zip(betas, loop.scalars, strict=True), start):
        assert scalars["dr2net/beta"] == (beta, iteration)
        assert scalars["dr2net/alpha"] == (1 - beta, iteration)
        assert scalars["dr2net/overflows"] == (0, iteration)
    assert loop.storage.smoothing_hints()["dr2net/beta"] is False
    lines = [message for message in caplog.messages if "alpha" in message]
    assert len(lines) == len(set(betas))
    assert lines[-1] == "iteration 8: alpha 0, beta 1"


def test_a_continuous_schedule_does_not_flood_the_log(caplog):
    schedule = CoefficientSchedule(start_beta=0, end_beta=1, duration=1, exact=False)
    sequence = ReversibleSequence([nn.Linear(4, 4)], Coefficients(), arithmetic="float")
    with caplog.at_level("INFO", logger="dr2net_d2.d2"):
        Loop(CoefficientHook(schedule, 1000), model=sequence).train(0, 1000)
    assert len([message for message in caplog.messages if "alpha" in message]) == 17


@pytest.mark.parametrize("start", [0, 6])
def test_every_block_has_coefficients_of_its_own(start, caplog):
    """The second function moves in the first half of the training, the first in the second."""

    def second_first(progress):
        betas = [max(progress - 0.5, 0), min(progress, 0.5)]
        return [1 - beta for beta in betas], betas

    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    model = ReversibleSequence(layers, Coefficients())
    loop = Loop(
        CoefficientHook(second_first, max_iter=8),
        model=model,
        watch=lambda: model.coefficients.values[1],
    )
    with caplog.at_level("INFO", logger="dr2net_d2"):
        loop.train(start, 8)
    betas = [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8), (2, 8), (4, 8), (6, 8)][start:]
    assert loop.seen == [(first / 16, second / 16) for first, second in betas]
    for iteration, ((first, second), scalars) in enumerate(
        zip(betas, loop.scalars, strict=True), start
    ):
        assert scalars["dr2net/beta"] == ((first + second) / 32, iteration)
        assert scalars["dr2net/beta_min"] == (first / 16, iteration)
        assert scalars["dr2net/beta_max"] == (second / 16, iteration)
        assert scalars["dr2net/alpha_min"] == (1 - second / 16, iteration)
        assert scalars["dr2net/alpha_max"] == (1 - first / 16, iteration)
    lines = [message for message in caplog.messages if "alpha" in message]
    assert len(lines) == len(betas)
    assert lines[-1] == "iteration 7: alpha 0.5 to 0.625, beta 0.375 to 0.5"
    assert "snapped" not in caplog.text


def test_a_model_without_a_stack_is_left_alone():
    loop = Loop(CoefficientHook(CoefficientSchedule(), 2), model=nn.Linear(2, 2))
    loop.train(0, 2)
    assert loop.scalars == [{}, {}]


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()


def test_the_draws_of_an_iteration_depend_on_its_number_and_rank_alone():
    def loop(start, rank=0):
        loop = Loop(SeedIterations(7, rank, world_size=2), watch=draws)
        loop.train(start, 6)
        return loop.seen

    whole = loop(0)
    draws()
    assert loop(4) == whole[4:]
    numbers = [values[0][0] for values in whole + loop(0, rank=1)]
    assert len(set(numbers)) == 12


class Regression(nn.Module):
    """Returns a dict of losses; ``weights`` has its weight in every iteration."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.weights = []

    def forward(self, x):
        self.weights.append(self.linear.weight.tolist())
        return {"loss": self.linear(x).square().mean()}

    def poison_gradient(self, *iterations):
        calls = itertools.count()
        self.linear.weight.register_hook(
            lambda grad: grad * math.inf if next(calls) in iterations else grad
        )


class Outer(TrainerBase):
    """Delegates the iteration to another trainer, as ``DefaultTrainer`` does."""

    def __init__(self, trainer):
        super().__init__()
        self._trainer = trainer
        self.model = trainer.model

    def run_step(self):
        self._trainer.iter = self.iter
        self._trainer.run_step()


def trainer(kind, nested, **kwargs):
    """A trainer of a ``Regression`` with a NonFiniteGuard."""
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.randn(100, 5, 3, generator=torch.Generator().manual_seed(0))
    inner = kind(model, batches, optimizer, **kwargs)
    outer = Outer(inner) if nested else inner
    outer.register_hooks([NonFiniteGuard()])
    return outer


@pytest.mark.parametrize("nested", [False, True])
def test_a_gradient_that_is_not_finite_ends_any_training_before_the_step(nested):
    loop = trainer(SimpleTrainer, nested)
    loop.model.poison_gradient(3)
    with pytest.raises(FloatingPointError, match=r"^the gradient of linear.weight is -?inf in 3"):
        loop.train(0, 6)
    assert loop.iter == 3
    assert loop.model.linear.weight.tolist() == loop.model.weights[-1] != loop.model.weights[-2]


def test_a_loss_that_is_not_finite_ends_any_training():
    loop = trainer(SimpleTrainer, nested=False)
    loop.model.linear.bias.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"^the loss is not finite \(loss inf\)"):
        loop.train(0, 6)
    loop.model(torch.ones(1, 3))  # the check ends with the training


@pytest.mark.parametrize("nested", [False, True])
def test_steps_that_a_scaler_skips_are_counted(nested, monkeypatch, caplog):
    # AMPTrainer insists on a GPU, though it works without one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop = trainer(AMPTrainer, nested, grad_scaler=scaler)
    loop.model.poison_gradient(0, 3, 5)
    loop.train(0, 8)
    assert [a != b for a, b in itertools.pairwise(loop.model.weights)] == [
        *(False, True, True, False, True, False, True)
    ]
    values = [value for value, _ in loop.storage.history("amp/skipped_steps").values()]
    assert values == [1, 1, 1, 2, 2, 3, 3, 3]
    assert [text for text in caplog.messages if "skipped" in text] == [
        f"iteration {iteration}: gradients overflowed at the loss scale {before}, so the step was "
        f"skipped and the scale is now {after} ({count} skipped so far)"
        for iteration, before, after, count in [(0, 1024, 512, 1), (3, 512, 256, 2)]
    ]
    resumed = trainer(AMPTrainer, nested, grad_scaler=scaler)
    resumed.load_state_dict(loop.state_dict())
    resumed.train(8, 9)
    assert resumed.storage.latest()["amp/skipped_steps"] == (3, 8)
    assert "Cannot find the hook" not in caplog.text


@pytest.mark.parametrize(("failing", "evaluated"), [(None, [1, 4]), (3, [1]), (0, [])])
def test_a_training_that_fails_in_its_last_iteration_is_not_evaluated(failing, evaluated):
    seen = []

    def watch():
        if loop.iter == failing:
            raise ZeroDivisionError

    loop = Loop(EvalUnlessFailed(2, lambda: seen.append(loop.iter)), watch=watch)
    with contextlib.suppress(ZeroDivisionError):
        loop.train(0, 4)
    assert seen == evaluated
