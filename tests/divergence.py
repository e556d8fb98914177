"""What both engines do about values that are not finite: the checks, for an engine's tests to run.

A training stops where such a value appears, and the checkpoints stay as they were.
"""

import math

import pytest
import torch

from tests.poison import (
    EARLY,
    LATE,
    finite_checkpoint,
    poison_gradient,
    poison_loss,
    poison_step,
    poison_weight,
)

FOURTH = "model_0000003.pth"
TOO_FAST = ("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0")


class Divergence:
    """Base of an engine's tests, which need two fixtures of the engine:

    train: ``train(change, "KEY", "VALUE", ...)``, a training of 8 iterations whose model goes
        through ``change``, with output in ``tmp_path / "output"``, a checkpoint after 4 iterations
        and an evaluation at the end only.
    options: options under which a nan in one gradient is to be noticed; with parameters.

    Attributes:
        losses: how a message lists an infinite loss_box_reg, as a regular expression.
    """

    losses: str

    @pytest.fixture
    def output(self, tmp_path):
        return tmp_path / "output"

    def test_a_gradient_stops_the_training_before_the_step(self, train, options, output):
        models = []

        def change(model):
            poison_gradient(model, EARLY, math.nan, 4)
            poison_gradient(model, LATE, math.nan, 4)
            models.append(model)

        message = (
            rf"^iteration 4: the gradient of {LATE} is nan in 1 of 3072 .* 2 non-finite.*BASE_LR"
        )
        with pytest.raises(FloatingPointError, match=message):
            train(change, *options)
        saved = finite_checkpoint(output, FOURTH)
        for name, parameter in models[0].named_parameters():
            assert torch.equal(parameter, saved[name]), name

    def test_a_failure_in_the_last_iteration_writes_and_evaluates_nothing(self, train, output):
        with pytest.raises(FloatingPointError, match=rf"^iteration 7: .*{EARLY} is inf"):
            train(lambda model: poison_gradient(model, EARLY, math.inf, 7))
        finite_checkpoint(output, FOURTH)
        assert not (output / "inference").exists()

    def test_a_weight_is_found_at_the_step_of_the_stream(self, train, output):
        message = r"^iteration 5: the residual stream after step 3 \(Block 1, branch 0\) .*BASE_LR"
        with pytest.raises(FloatingPointError, match=message):
            train(lambda model: poison_weight(model, LATE, math.nan, 5))
        finite_checkpoint(output, FOURTH)

    def test_a_loss_is_named_though_its_gradient_is_finite(self, train, output):
        message = rf"^iteration 5: the loss is not finite \({self.losses}\).*BASE_LR"
        with pytest.raises(FloatingPointError, match=message):
            train(lambda model: poison_loss(model, "loss_box_reg", math.inf, 5))
        finite_checkpoint(output, FOURTH)

    def test_weights_that_a_step_has_ruined_are_not_saved(self, train, output):
        handle = poison_step(math.inf, 3)
        message = r"^iteration 3: .* not finite after .*; model_0000003.pth has not been written"
        try:
            with pytest.raises(FloatingPointError, match=message):
                train(lambda model: None, "SOLVER.CHECKPOINT_PERIOD", "2")
        finally:
            handle.remove()
        finite_checkpoint(output, "model_0000001.pth")


def assert_one_line(captured):
    """What ``train_net.main`` has printed is one line of an error in iteration 1."""
    lines = [line for line in captured.err.splitlines() if "train_net" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train_net.py: error: iteration 1: ")
