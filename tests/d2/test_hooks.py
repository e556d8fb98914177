"""When the hooks act, and with what values, in a training loop of Detectron2 without a detector."""

import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from torch import nn

from dr2net_d2.core import Coefficients, CoefficientSchedule, ReversibleSequence
from dr2net_d2.d2 import CoefficientHook, PeakMemory, SeedIterations


class Loop(TrainerBase):
    """Runs hooks alone, and notes what ``watch`` gives in every iteration."""

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


def test_a_model_without_a_stack_is_left_alone():
    loop = Loop(CoefficientHook(CoefficientSchedule(), 2), model=nn.Linear(2, 2))
    loop.train(0, 2)
    assert loop.scalars == [{}, {}]


def test_peak_memory_is_written_every_iteration_and_never_falls(monkeypatch):
    peaks = iter([3 * 2**20, 5 * 2**20, 2**20])
    monkeypatch.setattr("dr2net_d2.d2.hooks.peak_memory_bytes", lambda device: next(peaks))
    loop = Loop(PeakMemory(), model=nn.Linear(2, 2))
    loop.train(0, 3)
    assert [row["memory/peak_mb"] for row in loop.scalars] == [(3, 0), (5, 1), (5, 2)]


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
