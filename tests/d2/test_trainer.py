"""The training loop: accumulation, processes, precision, averages, best weights, ``kill -9``."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dr2net_d2.core import CoefficientSchedule
from dr2net_d2.d2 import Settings, Trainer, run
from dr2net_d2.errors import ConfigError
from tests.d2.tiny import arguments

ROOT = Path(__file__).parents[2]

# Nothing is random: all anchors and proposals are sampled, equally many in each image.
DEFINITE = (
    "MODEL.VIT.DROP_PATH_RATE", 0.0,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096,
    "MODEL.RPN.POSITIVE_FRACTION", 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 256,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False,
    "INPUT.RANDOM_FLIP", "none",
    "SOLVER.IMS_PER_BATCH", 4,
    "SOLVER.MAX_ITER", 4,
    "DATASETS.TEST", (),
)  # fmt: skip


def scalars(folder):
    """The rows of metrics.json with losses, by iteration."""
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "total_loss" in row]
    return {row["iteration"]: row for row in rows}


def weights(folder, name="model_final.pth"):
    return torch.load(folder / "output" / name)["model"]


def assert_same_training(folder, other):
    loss, other_loss = scalars(folder)[3], scalars(other)[3]
    for key in ("total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
        assert other_loss[key] == pytest.approx(loss[key], rel=1e-4), key
    expected = weights(folder)
    for key, tensor in weights(other).items():
        if "stream_range" not in key:  # depends on the images of the first process
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a training in one process, with all images of an iteration at once."""
    folder = tmp_path_factory.mktemp("whole")
    run(arguments(folder, *DEFINITE))
    return folder


@pytest.mark.parametrize("steps", [2, 4])
def test_accumulation_is_the_same_training(whole, tmp_path, steps):
    run(arguments(tmp_path, *DEFINITE, "SOLVER.ACCUMULATION_STEPS", steps))
    assert_same_training(whole, tmp_path)


@pytest.mark.parametrize("steps", [1, 2])
def test_two_processes_of_launch_are_the_same_training(whole, tmp_path, monkeypatch, steps):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run(arguments(tmp_path, *DEFINITE, "SOLVER.ACCUMULATION_STEPS", steps, num_gpus=2))
    assert_same_training(whole, tmp_path)


def command(folder, *opts, resume=False):
    """The command line of train_net.py for the tiny config."""
    args = arguments(folder, *opts)
    flags = ["--resume"] if resume else []
    script = [str(ROOT / "train_net.py"), "--engine", "detectron2", *flags]
    return [*script, "--config-file", args.config_file, *args.opts]


def test_two_processes_of_torchrun_are_the_same_training(whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc-per-node", "2", *command(tmp_path, *DEFINITE)]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    assert_same_training(whole, tmp_path)


def test_torchrun_decides_on_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConfigError, match=r"leave out --num-gpus"):
        run(arguments(tmp_path, num_gpus=2))


def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    run(arguments(alone))
    process = subprocess.Popen(
        [sys.executable, *command(killed)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # sums in this process's order
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (killed / "output" / "model_0000003.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "output" / "model_final.pth").exists(), "it ended before it was killed"
    run(arguments(killed, resume=True))
    expected = weights(alone)
    for key, tensor in weights(killed).items():
        assert torch.equal(tensor, expected[key]), key


class Mean(nn.Module):
    """Regresses the weight to the mean of the batch; ``seen`` has the dtypes of products."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.seen = []

    def forward(self, batch):
        self.seen.append((batch @ self.weight).dtype)
        return {"loss": (self.weight - batch.mean()).square().sum() / 2}


def trainer(folder, max_iter=4, evaluate=lambda *_: {}, **settings):
    """A trainer with SGD at rate 1/2, on batches with means 1, 2, 1, 2, ..."""
    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = cycle([torch.ones(2, 1), 2 * torch.ones(2, 1)])
    return Trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, lambda _: 1.0),
        train_loader=batches,
        evaluate=evaluate,
        settings=Settings(
            output_dir=str(folder), max_iter=max_iter, schedule=CoefficientSchedule(), **settings
        ),
    )


WEIGHTS = [0.5, 1.25, 1.125, 1.5625]
"""The weight after each step w -> (w + mean) / 2, from 0."""


def test_the_average_is_evaluated_and_kept_in_a_file(tmp_path):
    seen = []
    loop = trainer(
        tmp_path,
        evaluate=lambda model, final: seen.append((model.weight.item(), final)) or {},
        ema_decay=0.75, eval_period=2,
    )  # fmt: skip
    loop.resume_or_load("", resume=False)
    loop.train()
    averages, average = [], 0.0
    for weight in WEIGHTS:
        average = 0.75 * average + 0.25 * weight
        averages.append(average)
    assert [final for _, final in seen] == [False, True]
    assert [weight for weight, _ in seen] == pytest.approx([averages[1], averages[3]])
    assert loop.model.weight.item() == WEIGHTS[3]
    assert torch.load(tmp_path / "model_final.pth")["model"]["weight"].item() == WEIGHTS[3]
    kept = torch.load(tmp_path / "model_ema.pth")["model"]["weight"]
    assert kept.item() == pytest.approx(averages[3])
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_the_average_goes_on_after_a_resumption(tmp_path):
    whole = trainer(tmp_path / "whole", ema_decay=0.75)
    parts = [trainer(tmp_path / "parts", n, ema_decay=0.75) for n in (2, 4)]
    for loop in (whole, *parts):
        Path(loop.settings.output_dir).mkdir(exist_ok=True)
        loop.resume_or_load("", resume=True)
        loop.train()
    kept = [torch.load(tmp_path / n / "model_ema.pth")["model"] for n in ("whole", "parts")]
    assert torch.equal(kept[0]["weight"], kept[1]["weight"])


def results(*values):
    """An evaluation that returns one value after the other."""
    remaining = iter(values)
    return lambda *_: {"bbox": {"AP": next(remaining), "AP50": 0.0}}


def test_the_weights_of_the_best_evaluation_are_kept_also_after_a_resumption(tmp_path):
    best = {"best_metric": "bbox/AP", "eval_period": 1}
    nan = float("nan")
    first = trainer(tmp_path, 3, results(nan, 20.0, 10.0), **best)
    first.resume_or_load("", resume=True)
    first.train()
    assert torch.load(tmp_path / "model_best.pth")["model"]["weight"].item() == WEIGHTS[1]
    # The batches of the resumed trainings start again with a mean of 1.
    for value, kept in ((19.0, WEIGHTS[1]), (21.0, (WEIGHTS[2] + 1) / 2)):
        (tmp_path / "last_checkpoint").write_text("model_final.pth")
        later = trainer(tmp_path, 4, results(value), **best)
        saved = (tmp_path / "model_final.pth").read_bytes()
        later.resume_or_load("", resume=True)
        later.train()
        assert torch.load(tmp_path / "model_best.pth")["model"]["weight"].item() == kept
        (tmp_path / "model_final.pth").write_bytes(saved)


def test_a_result_that_is_not_there_cannot_be_the_best(tmp_path):
    loop = trainer(tmp_path, 1, results(1.0), best_metric="segm/AP")
    with pytest.raises(ConfigError, match=r"'segm/AP', but results are bbox/AP, bbox/AP50"):
        loop.train()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_are_in_the_dtype_of_autocast(tmp_path, dtype):
    loop = trainer(tmp_path, amp_dtype=dtype)
    loop.train()
    assert set(loop.model.seen) == {dtype or torch.float32}
    assert loop.model.weight.item() == WEIGHTS[3]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"max_iter": 0}, "max_iter is 0"), ({"max_iter": 1, "ema_decay": 1.0}, "ema_decay is 1.0")],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(output_dir="", schedule=CoefficientSchedule(), **values)
