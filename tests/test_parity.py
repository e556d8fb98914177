"""projects/parity: its arms are what they are called, its bookkeeping follows hand-made tables."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dr2net_d2.data import load_coco, read_image, resolve_dataset
from dr2net_d2.errors import ConfigError
from projects.parity import arms, figures, finetune, photo_shapes, report, run

ROOT = Path(__file__).parents[1]
PROJECTS = ROOT / "projects"
SMALL = (
    ("MODEL.WEIGHTS", "''"),
    ("SOLVER.MAX_ITER", "4"),
    ("SOLVER.WARMUP_ITERS", "1"),
    ("SOLVER.IMS_PER_BATCH", "2"),
    ("DATASETS.TRAIN", "('small_digits_train_n4_s64_d3',)"),
    ("DATASETS.TEST", "('small_digits_val_n2_s64_d3',)"),
)
SMALL_WORDS = tuple(word for pair in SMALL for word in pair)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.chdir(ROOT)
    return arms, finetune, run, report, figures


@pytest.fixture
def shapes():
    return photo_shapes


def trial(finetune, arm, rate=1e-3):
    row = finetune.finetune(finetune.Run("final", arm, rate, seed=1), SMALL_WORDS)
    assert row["status"] == "finished"
    return row


def test_checkpointing_changes_nothing(scripts):
    _, finetune, *_ = scripts
    plain, checkpointed = (trial(finetune, arm) for arm in ("conventional", "checkpointing"))
    for row in (plain, checkpointed):
        del row["arm"], row["minutes"]
    assert plain == checkpointed
    assert len(plain["gradient_error"]) == 5


def test_gradient_errors_are_those_of_the_arms(scripts):
    _, finetune, *_ = scripts
    errors = {}
    for arm in ("convex", "static-exact", "static-exact-stored", "static-float", "static-stored"):
        errors[arm] = [error for *_, error in trial(finetune, arm)["gradient_error"]]
    float_errors = errors.pop("static-float")
    assert all(max(found) < 1e-5 for found in errors.values())
    # 10.9^24 times the rounding error: all digits are lost.
    assert min(float_errors) > 0.1


@pytest.mark.parametrize("arm", ["frozen", "lora"])
def test_pretrained_weights_stay(scripts, arm):
    arms, finetune, *_ = scripts
    training, vit, _ = finetune.prepare(arms.EVERYTHING[arm], list(SMALL_WORDS), seed=1)
    before = {name: p.clone() for name, p in vit.named_parameters() if not p.requires_grad}
    features = vit(torch.ones(1, 3, 64, 64))["last_feat"]
    images = [torch.rand(3, 64, 64) * 255] * 2
    boxes = {"boxes": torch.tensor([[8.0, 8, 24, 30]]), "labels": torch.tensor([3])}
    sum(training.model(images, [boxes] * 2).values()).backward()
    training.optimizer.step()
    after = dict(vit.named_parameters())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    trained = [name for name in after if name not in before]
    linears = sum(isinstance(module, nn.Linear) for module in vit.blocks.modules())
    assert len(trained) == (2 * linears if arm == "lora" else 0)
    same = torch.equal(vit(torch.ones(1, 3, 64, 64))["last_feat"], features)
    assert same == (arm == "frozen")


def test_lora_starts_from_the_pretrained_network(scripts):
    arms, finetune, *_ = scripts
    outputs = []
    for arm in ("conventional", "lora"):
        _, vit, _ = finetune.prepare(arms.EVERYTHING[arm], list(SMALL_WORDS), seed=1)
        outputs.append(vit(torch.ones(1, 3, 64, 64))["last_feat"])
    assert torch.equal(*outputs)


def test_k_is_fixed(scripts):
    arms, finetune, *_ = scripts
    prepared = finetune.prepare(arms.EVERYTHING["convex/k-14"], list(SMALL_WORDS), seed=1)
    vit = prepared.vit
    vit.coefficients.set(0.5, 0.5)
    vit(torch.ones(1, 3, 64, 64))["last_feat"].sum().backward()
    assert vit.blocks.fraction_bits == 14


def test_the_first_blocks_alone(scripts):
    arms, finetune, *_ = scripts
    image = torch.ones(1, 3, 64, 64)
    outputs = []
    for name in ("conventional", "first-6"):
        vit = finetune.prepare(arms.EVERYTHING[name], list(SMALL_WORDS), seed=1).vit
        if name == "conventional":
            for i in range(6, 12):  # a block whose branches end in 0 hands on what it gets
                for layer in (vit.blocks[i].attn.proj, vit.blocks[i].mlp.fc2):
                    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        outputs.append(vit(image)["last_feat"])
    assert len(vit.blocks) == 6 and torch.equal(*outputs)


def test_every_config_is_accepted(scripts):
    arms, finetune, *_ = scripts
    for arm in arms.EVERYTHING.values():
        if arm.engine == "torchvision":
            schedule = finetune.prepare(arm, list(SMALL_WORDS), seed=1).training.schedule
            for progress in (0.0, 0.3, 1.0):
                alpha, beta = schedule(progress)
                assert 0 <= alpha <= 1 and 0 <= beta <= 1 and alpha + beta <= 1.125
    assert arms.cosine(0.25) == arms.HALF(0.25)  # half the way
    assert arms.cosine(0.05)[1] < arms.HALF(0.05)[1]
    assert arms.after_rest(0.1, 0.09) == (1.0, 0.0)
    assert arms.after_rest(0.1, 1.0) == (0.5, 0.5)


def test_a_longer_training_differs_in_its_length_alone(scripts):
    arms, finetune, run, *_ = scripts
    for arm in arms.LONG:
        short = arms.EVERYTHING[arm.name.removeprefix("long/")]
        assert (arm.equip, arm.schedule) == (short.equip, short.schedule)
        configs = [
            finetune.load_config(str(finetune.CONFIG), each.overrides(), "torchvision")
            for each in (short, arm)
        ]
        solver = configs[1].SOLVER
        assert (solver.MAX_ITER, solver.WARMUP_ITERS) == (1600, 160)
        solver.MAX_ITER, solver.WARMUP_ITERS = 400, 40
        assert configs[0] == configs[1]
        rows = tuning(short.name, _1=50.0, _2=52.0, _4=51.0)
        assert next(run.outstanding(rows, [arm], [1])) == finetune.Run("final", arm.name, 2e-3, 1)


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("disc", math.pi / 4),
        ("ring", math.pi / 4 * (1 - 0.55**2)),
        ("cross", None),
    ],
)
def test_a_shape_fills_its_box(shapes, kind, share):
    rng = np.random.default_rng(0)
    for side in (12, 21, 30):
        opacity = shapes.draw_shape(kind, side, rng)
        assert max(opacity.shape) == side and opacity.min() >= 0
        assert opacity.max() == pytest.approx(1)
        for edge in (opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]):
            assert edge.max() > 0
        if share is not None:
            assert opacity.mean() == pytest.approx(share, abs=0.03)
        assert round(opacity[opacity.shape[0] // 2, opacity.shape[1] // 2]) == (kind != "ring")


def test_photo_shapes_is_a_dataset_that_the_seed_determines(shapes, tmp_path):
    assert not set(shapes.PHOTOGRAPHS["train"]) & set(shapes.PHOTOGRAPHS["val"])
    made = [
        shapes.write(tmp_path / name, split, 6, seed)
        for name, split, seed in (("a", "val", 0), ("b", "val", 0), ("c", "val", 1))
    ]
    contents = [load_coco(*files) for files in made]
    assert made[0][0].read_bytes() == made[1][0].read_bytes() != made[2][0].read_bytes()
    assert contents[0].categories == tuple(shapes.OUTLINES) and contents[0].dropped == 0
    for first, second in zip(contents[0].records, contents[1].records, strict=True):
        assert (read_image(first) == read_image(second)).all()
        taken = np.zeros((shapes.SIDE, shapes.SIDE), int)
        for x0, y0, x1, y1 in first.boxes.astype(int):
            assert shapes.MIN_SIDE <= max(x1 - x0, y1 - y0) <= shapes.MAX_SIDE
            taken[y0:y1, x0:x1] += 1
        assert 0 < taken.max() <= 1


def test_photo_shapes_are_found_by_name(shapes):
    shapes.provide(["small_digits_train", "photo_shapes_val_seed1", "photo_shapes_val_seed1"])
    assert len(load_coco(*resolve_dataset("photo_shapes_val_seed1")).records) == 300


def tuning(arm, **found):
    return [
        {"stage": "tuning", "arm": arm, "rate": float(rate[1:]) * 1e-3, "seed": 100}
        | ({"status": "finished", "AP": ap} if ap is not None else {"status": "diverged"})
        for rate, ap in found.items()
    ]


def test_learning_rates_are_tried_until_the_best_is_inside(scripts):
    _, _, run, *_ = scripts
    assert run.rates_to_try({}) == [1e-3, 2e-3, 4e-3]
    assert run.rates_to_try({1e-3: 5.0, 4e-3: 6.0}) == [2e-3]
    assert run.rates_to_try({1e-3: 5.0, 2e-3: 7.0, 4e-3: 6.0}) == []
    assert run.rates_to_try({1e-3: 5.0, 2e-3: 6.0, 4e-3: 7.0}) == [8e-3]
    assert run.rates_to_try({1e-3: 5.0, 2e-3: 4.0, 4e-3: -1.0}) == [5e-4]
    assert run.rates_to_try({2.5e-4: 9.0, 5e-4: 8.0, 1e-3: 5.0, 2e-3: 4.0, 4e-3: 3.0}) == []


def test_what_is_there_is_skipped(scripts):
    arms, finetune, run, *_ = scripts
    chosen = [arms.EVERYTHING[name] for name in ("conventional", "checkpointing", "convex")]
    rows = tuning("conventional", _1=50.0, _2=52.0, _4=None)
    rows.append({"stage": "final", "arm": "conventional", "rate": 2e-3, "seed": 1})
    found = list(run.outstanding(rows, chosen, [1, 2]))
    assert found == [
        *(finetune.Run("tuning", "convex", rate, 100) for rate in (1e-3, 2e-3, 4e-3)),
        finetune.Run("final", "checkpointing", 2e-3, 1),
        finetune.Run("final", "conventional", 2e-3, 2),
        finetune.Run("final", "checkpointing", 2e-3, 2),
    ]
    args = run.argparse.Namespace(arms=["konvex"], jobs=1, seeds=1, minutes=0)
    with pytest.raises(ConfigError, match="'konvex' is no arm; use some of conventional"):
        run.run_outstanding(args)


def final(arm, seed, ap, error=1e-6):
    row = {"stage": "final", "arm": arm, "rate": 2e-3, "seed": seed, "curve": [[4, ap]]}
    row |= {"loss": [[2, 3.0], [4, 2.0]], "gradient_error": [[0.0, 0.9, 0.1, error]]}
    scores = {"AP50": ap + 30, "APs": ap}
    return {**row, "status": "finished", "AP": ap, **scores, "processor": "x", "torch": "2"}


def test_tables_and_pictures_by_hand(scripts, tmp_path):
    *_, report, figures = scripts
    rows = [
        *(final("conventional", seed, ap) for seed, ap in ((1, 50.0), (2, 52.0), (3, 54.0))),
        *(final("convex", seed, ap, None) for seed, ap in ((1, 51.0), (3, 52.0))),
        {**final("hard-1", 1, 0.0), "status": "diverged"},
    ]
    assert report.spread([50.0, 52.0, 54.0]) == "52.0 ± 2.0"
    assert report.differences(rows[3:5], rows[:3]) == [1.0, -2.0]
    costs = {
        "setting": {"processor": "x", "threads": 1, "torch": "2"},
        "arms": {
            "conventional": {"peak_bytes": 4e8, "step_seconds": [1.0, 2.0, 9.0]},
            "convex": {"peak_bytes": 1e8, "step_seconds": [3.0, 3.0, 3.0]},
        },
    }
    table = report.arm_table(rows, costs, ["conventional", "convex", "hard-1", "frozen"])
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    measured = "0.002; 52.0 ± 2.0; +0.0 ± 0.0; 82.0 ± 2.0; 52.0 ± 2.0; 3; 400; 1.00 x; 1.0e-06"
    other = "0.002; 51.5 ± 0.7; -0.5 ± 2.1; 81.5 ± 0.7; 51.5 ± 0.7; 2; 100; 1.50 x; not finite"
    assert ["; ".join(line) for line in lines] == [
        measured,
        other,
        "0.002; - (1 of 1 diverged); -; -; -; 1; not measured; not measured; 1.0e-06",
        "-; not measured; -; -; -; -; not measured; not measured; -",
    ]
    figures.draw_arms(rows, costs, tmp_path / "arms.png")
    figures.draw_curves(rows, tmp_path / "curves.png")
    figures.draw_ablations(rows, tmp_path / "ablations.png")
    figures.draw_tasks(rows, tmp_path / "tasks.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_labels_move_apart_about_where_they_belong(scripts):
    *_, figures = scripts
    assert figures.spread_labels([1.0, 1.0, 1.0, 9.0], 2.0) == pytest.approx([-1, 1, 3, 9])
    assert figures.spread_labels([1.0, 2.0], 0.5) == pytest.approx([1, 2])


def test_the_page_is_that_of_the_committed_results(scripts, monkeypatch, tmp_path):
    *_, report, _ = scripts
    pages = [PROJECTS / "parity" / "README.md", PROJECTS.parent / "README.md"]
    before = [page.read_text() for page in pages]
    rows, costs = report.read_results(), json.loads(report.COSTS.read_text())
    for name, table in report.tables(rows, costs).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in before[0]
    assert report.top_level(rows, costs) in before[1]
