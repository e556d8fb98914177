"""Fully sharded training in two processes, against the same training in one."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dr2net_d2.d2 import Dr2NetCheckpointer, run
from dr2net_d2.d2.lazy_experiment import LazyExperiment
from dr2net_d2.d2.sharding import shard
from dr2net_d2.d2.yaml_experiment import YamlExperiment
from dr2net_d2.training.guards import check_gradients
from tests.core.ranks import on_two_ranks
from tests.d2 import test_lazy_experiment as lazy
from tests.d2 import test_stage_detectors as stages
from tests.d2.test_trainer import DEFINITE, assert_same_training, weights
from tests.d2.tiny import arguments
from tests.poison import LATE

SHARDED = ("SOLVER.FSDP", True)
FIVE = ("DATASETS.TEST", ("small_digits_val_n5_s64_d3",))  # 3 for one process, 2 for the other
TESTED = (*FIVE, "TEST.EVAL_PERIOD", 2, "TEST.BEST_CHECKPOINT", "bbox/AP")
HALFWAY = ("SOLVER.CHECKPOINT_PERIOD", 2)
CLIPPED = (
    "SOLVER.OPTIMIZER", "SGD",  # unlike AdamW, it depends on the scale of the gradients
    "SOLVER.BASE_LR", 0.05,
    "SOLVER.CLIP_GRADIENTS.ENABLED", True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1,
    "SOLVER.EMA_DECAY", 0.5,
)  # fmt: skip
HALF = "model_0000001.pth"


def train(folder, *opts, resume=False):
    run(arguments(folder, *DEFINITE, *opts, resume=resume))


def train_swin(folder, *opts):
    definite = (*DEFINITE[2:], "MODEL.SWIN.DROP_PATH_RATE", 0.0, "SOLVER.MAX_ITER", 2)
    run(stages.arguments(folder, "swin", *definite, *opts))


def half_trained(folder, source):
    """A folder in the state of ``source`` when half of its training was done."""
    (folder / "output").mkdir(parents=True)
    shutil.copy(source / "output" / HALF, folder / "output")
    (folder / "output" / "last_checkpoint").write_text(HALF)
    return folder


def local_bytes(tensors):
    """(bytes in this process, bytes in all of them, whether all tensors are sharded)."""
    tensors = [*tensors]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    own, whole = (sum(tensor.nbytes for tensor in each) for each in (local, tensors))
    return own, whole, all(isinstance(tensor, DTensor) for tensor in tensors)


def after_one_iteration(folder):
    """The bytes that this process holds, and its messages for damage to the other's shards."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    args = arguments(folder, *DEFINITE, *SHARDED, "SOLVER.MAX_ITER", 1)
    trainer = YamlExperiment(args).trainer()
    trainer.resume_or_load("", resume=False)
    trainer.train()
    model, states = trainer.model, trainer.optimizer.state.values()
    held = {
        "parameters": local_bytes(model.parameters()),
        "gradients": local_bytes(p.grad for p in model.parameters()),
        "optimizer": local_bytes(
            state[name] for state in states for name in ("exp_avg", "exp_avg_sq")
        ),
    }
    return held, damaged(model, str(folder / "output"))


def damaged(model, folder):
    parameter = model.get_parameter(LATE)
    checkpointer = Dr2NetCheckpointer(model, folder)
    messages = []
    for tensor, notice in (
        (parameter.grad, partial(check_gradients, model)),
        (parameter, partial(checkpointer.save_weights, "damaged")),
    ):
        with torch.no_grad():
            if dist.get_rank() == 1:
                tensor.to_local()[0, 0] = math.nan
        with pytest.raises(FloatingPointError) as caught:
            notice()
        messages.append(str(caught.value))
    return messages


def scaled_steps():
    """Loss scale and weight after a step with an overflow in one shard, then after one without."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for overflows in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        if overflows and dist.get_rank() == 1:
            model.weight.grad.to_local()[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), model.weight.full_tensor().detach()))
    return seen


def lazily(folder):
    """Whether the parameters of a LazyConfig's model, and of its optimizer, are sharded."""
    opts = ("train.fsdp=True", "model.roi_heads.box_head.fc_dims=[16]")
    experiment = LazyExperiment(lazy.arguments(folder, lazy.READY, *opts, weights=""))
    groups = experiment.trainer().optimizer.param_groups
    optimized = [parameter for group in groups for parameter in group["params"]]
    return [
        all(isinstance(parameter, DTensor) for parameter in parameters)
        for parameters in (experiment.model.parameters(), optimized)
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folders of trainings in one process."""
    folders = {
        name: tmp_path_factory.mktemp(name) for name in ("tested", "clipped", "free", "swin")
    }
    train(folders["tested"], *TESTED, *HALFWAY)
    train(folders["clipped"], *CLIPPED, *FIVE, *HALFWAY)
    train(folders["free"], *CLIPPED, "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    train_swin(folders["swin"])
    return folders


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """(the parent of the folders of sharded trainings, each process's results by scenario)."""
    base = tmp_path_factory.mktemp("two")
    trainings = {
        "clipped": FIVE,
        "accumulated": ("SOLVER.ACCUMULATION_STEPS", 2),
        "half": ("SOLVER.FP16_COMPRESSION", True),
    }
    for name in (*trainings, "swin"):
        (base / name).mkdir()
    resumed = half_trained(base / "resumed", one["clipped"])
    scenarios = {
        **{
            name: partial(train, base / name, *CLIPPED, *SHARDED, *opts)
            for name, opts in trainings.items()
        },
        "swin": partial(train_swin, base / "swin", *SHARDED),
        "resumed": partial(train, resumed, *CLIPPED, *SHARDED, resume=True),
        "one iteration": partial(after_one_iteration, base / "iteration"),
        "scaled": scaled_steps,
        "lazy": partial(lazily, base),
    }
    return base, on_two_ranks(base, scenarios)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder and the results of a training started by Detectron2's ``launch``."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        results = run(arguments(folder, *DEFINITE, *TESTED, *HALFWAY, *SHARDED, num_gpus=2))
    return folder, results


def distance(folder, other, name="model_final.pth"):
    """The largest difference between two files of weights with the same keys."""
    ours, theirs = weights(folder, name), weights(other, name)
    assert list(ours) == list(theirs)
    return max((ours[key] - theirs[key]).abs().max() for key in ours if "stream_range" not in key)


def test_a_sharded_training_is_the_training_of_one_process(one, launched):
    folder, _ = launched
    assert_same_training(one["tested"], folder)
    assert distance(folder, one["tested"]) < 1e-5


def test_its_checkpoints_are_those_of_one_process(one, launched):
    files = [torch.load(folder / "output" / HALF) for folder in (launched[0], one["tested"])]
    ours, theirs = [{**file["trainer"]["optimizer"], **file} for file in files]
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, values in theirs["state"].items():
        torch.testing.assert_close(ours["state"][index], values, rtol=1e-3, atol=1e-5)


def assert_same_detections(folder, other):
    ours, theirs = [
        json.loads((f / "output/inference/coco_instances_results.json").read_text())
        for f in (folder, other)
    ]
    assert len(ours) == len(theirs) > 50
    for found, expected in zip(ours, theirs, strict=True):
        assert found["image_id"] == expected["image_id"]
        assert found["score"] == pytest.approx(expected["score"], rel=1e-4)
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=1e-2)


def test_its_weights_are_evaluated_in_one_process(launched, tmp_path):
    folder, results = launched
    final = ("MODEL.WEIGHTS", folder / "output" / "model_final.pth")
    alone = run(arguments(tmp_path, *DEFINITE, *TESTED, *final, eval_only=True))
    assert alone["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert_same_detections(folder, tmp_path)


def test_the_best_weights_are_whole(launched):
    best, half = weights(launched[0], "model_best.pth"), weights(launched[0], HALF)
    for key, tensor in half.items():  # no later AP was better than the first
        assert torch.equal(best[key], tensor), key


def test_averages_are_evaluated(one, two):
    assert_same_detections(two[0] / "clipped", one["clipped"])


def test_it_is_resumed_without_shards(launched, tmp_path):
    folder = half_trained(tmp_path / "resumed", launched[0])
    train(folder, *TESTED, resume=True)
    assert distance(folder, launched[0]) < 1e-5


def test_a_training_of_one_process_is_resumed_with_shards(one, two):
    base, _ = two
    for name in ("model_final.pth", "model_ema.pth"):
        assert distance(base / "resumed", one["clipped"], name) < 1e-5


@pytest.mark.parametrize("name", ["clipped", "accumulated"])
def test_gradients_are_clipped_by_the_norm_of_all_shards(one, two, name):
    base, _ = two
    assert distance(one["free"], one["clipped"]) > 1e-3
    assert_same_training(one["clipped"], base / name)
    for file in ("model_final.pth", "model_ema.pth"):
        assert distance(base / name, one["clipped"], file) < 1e-5


def test_gradients_are_sent_in_half_precision(one, two):
    base, _ = two
    assert 1e-6 < distance(base / "half", one["clipped"]) < 1e-3


def test_a_backbone_of_stages_is_sharded_too(one, two):
    base, _ = two
    assert distance(base / "swin", one["swin"]) < 1e-5


def test_each_process_holds_its_half_of_everything(two):
    _, ranks = two
    held = [rank["one iteration"][0] for rank in ranks]
    for name in ("parameters", "gradients", "optimizer"):
        (first, whole, sharded), (second, *_) = (each[name] for each in held)
        assert sharded and first + second == whole, name
        assert 0.45 < first / whole < 0.55, name


def test_damage_in_one_shard_is_named_by_every_process(two):
    _, ranks = two
    for rank in ranks:
        gradient, weight = rank["one iteration"][1]
        assert gradient.startswith(f"the gradient of {LATE} is nan in 1 of 3072 elements")
        assert weight.startswith(f"{LATE} is not finite after the optimizer's step (1 of ")
        assert "damaged.pth has not" in weight
    assert not (two[0] / "iteration" / "output" / "damaged.pth").exists()


def test_an_overflow_in_one_shard_skips_the_step_of_every_process(two):
    _, ranks = two
    for rank in ranks:
        (first_scale, first), (scale, weight) = rank["scaled"]
        assert first_scale == scale == 4.0
        assert torch.equal(first, torch.ones(4, 4)) and torch.equal(weight, torch.zeros(4, 4))


def test_a_lazyconfig_shards_before_its_optimizer_is_built(two):
    _, ranks = two
    assert [rank["lazy"] for rank in ranks] == [[True, True], [True, True]]


def test_one_process_has_nothing_to_shard(one, tmp_path):
    train(tmp_path, *CLIPPED, *SHARDED)
    assert distance(tmp_path, one["clipped"]) == 0
