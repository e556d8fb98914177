import json
import math
import shutil

import pytest
import torch

from dr2net_d2.errors import ConfigError, UserError, WeightsError
from dr2net_d2.evaluation import PROTOCOLS, RESULTS_FILE, evaluate_boxes
from dr2net_d2.report import __main__ as report
from dr2net_d2.training.optimizer import build_optimizer
from dr2net_d2.tv import engine, training
from dr2net_d2.tv.dataset import load_split

LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "total_loss"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory, dataset_cache):
    """A training of 8 iterations with a checkpoint after 4: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("finished") / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_PERIOD", 2)
        metrics = engine.run(arguments("OUTPUT_DIR", str(folder)))
    return folder, metrics


def test_the_output_folder_is_what_detectron2_users_expect(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {
        *("config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_0000003.pth"),
        *("model_final.pth", "inference", "curves.png", "predictions.png"),
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".partial") for name in names)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert "MAX_ITER: 8" in (folder / "config.yaml").read_text()
    log = (folder / "log.txt").read_text()
    assert "small_digits_train_n8_s64_d3: 8 images" in log
    assert "iteration 8 of 8" in log


def test_metrics_file(finished):
    folder, metrics = finished
    rows = lines(folder / "metrics.json")
    trained = [row for row in rows if "total_loss" in row]
    evaluated = [row for row in rows if "bbox/AP" in row]
    assert [row["iteration"] for row in trained] == [1, 3, 5, 7]
    assert [row["iteration"] for row in evaluated] == [3, 7]
    for row in trained:
        assert row.keys() == LOSSES | {
            *("iteration", "lr", "time", "memory/peak_mb"),
            *(
                "dr2net/alpha",
                "dr2net/beta",
                "dr2net/fraction_bits",
                "dr2net/overflows",
                "dr2net/stream_peak",
            ),
        }
        parts = sum(row[name] for name in LOSSES - {"total_loss"})
        assert row["total_loss"] == pytest.approx(parts)
    assert [row["dr2net/beta"] for row in trained] == [0.1875, 0.375, 0.5, 0.5]
    # Cosine from the end of the warmup on: 0.001 * (1 + cos(pi * 3 / 8)) / 2.
    assert trained[1]["lr"] == pytest.approx(0.001 * (1 + math.cos(math.pi * 3 / 8)) / 2)
    assert evaluated[-1]["bbox/AP50"] == pytest.approx(metrics["bbox"]["AP50"], nan_ok=True)


def test_reported_metrics_are_those_of_the_results_file(finished, dataset_cache):
    folder, metrics = finished
    results = json.loads((folder / RESULTS_FILE).read_text())
    split = load_split("small_digits_val_n4_s64_d3")
    assert {row["category_id"] for row in results} <= set(split.content.category_ids)
    assert {row["image_id"] for row in results} == {r.image_id for r in split.content.records}
    expected = evaluate_boxes(split.json_file, results).metrics
    assert metrics == {"bbox": pytest.approx(expected, nan_ok=True)}
    saved = json.loads((folder / "inference" / "evaluation.json").read_text())
    assert saved["protocol"] == "coco"
    assert {row.get("protocol") for row in lines(folder / "metrics.json")} == {None, "coco"}


def test_results_say_their_protocol(finished, arguments, tmp_path):
    weights = ("MODEL.WEIGHTS", str(finished[0] / "model_final.pth"))
    options = ("OUTPUT_DIR", str(tmp_path / "eval"), "TEST.PROTOCOL", "visdrone")
    metrics = engine.run(arguments(*weights, *options, eval_only=True))["bbox"]
    results = json.loads((tmp_path / "eval" / RESULTS_FILE).read_text())
    json_file = load_split("small_digits_val_n4_s64_d3").json_file
    expected = evaluate_boxes(json_file, results, PROTOCOLS["visdrone"]).metrics
    assert metrics == pytest.approx(expected, nan_ok=True)
    saved = json.loads((tmp_path / "eval" / "inference" / "evaluation.json").read_text())
    assert saved["protocol"] == "visdrone"
    log = (tmp_path / "eval" / "log.txt").read_text()
    assert "by the protocol visdrone (VisDrone-DET toolkit: 500 detections" in log
    assert "DETECTIONS_PER_IMAGE is 100, but the protocol visdrone counts up to 500" in log


def test_a_resumed_training_ends_bit_for_bit_the_same(finished, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_PERIOD", 2)
    folder, metrics = finished
    shutil.copy(folder / "model_0000003.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    # As if the first run had gone on for some lines after the checkpoint.
    shutil.copy(folder / "metrics.json", tmp_path)
    torch.manual_seed(999)
    workers = ("DATALOADER.NUM_WORKERS", "2")
    resumed = engine.run(arguments("OUTPUT_DIR", str(tmp_path), *workers, resume=True))

    assert resumed == {"bbox": pytest.approx(metrics["bbox"], nan_ok=True, rel=0, abs=0)}
    whole, parts = (torch.load(f / "model_final.pth") for f in (folder, tmp_path))
    assert whole.keys() == parts.keys()
    assert whole.keys() >= {"model", "optimizer", "scaler", "iteration", "seed", "rng"}
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    varying = {"time", "memory/peak_mb"}
    first, second = (
        [{k: v for k, v in row.items() if k not in varying and v == v} for row in lines(f)]
        for f in (folder / "metrics.json", tmp_path / "metrics.json")
    )
    assert first == second


def test_resuming_a_finished_training_only_evaluates(finished, arguments, tmp_path):
    folder, metrics = finished
    shutil.copytree(folder, tmp_path / "copy")
    again = engine.run(arguments("OUTPUT_DIR", str(tmp_path / "copy"), resume=True))
    assert again == {"bbox": pytest.approx(metrics["bbox"], nan_ok=True, rel=0, abs=0)}


def test_eval_only_equals_the_final_evaluation(finished, arguments, tmp_path):
    folder, metrics = finished
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    output = ("OUTPUT_DIR", str(tmp_path / "eval"))
    assert engine.run(arguments(*weights, *output, eval_only=True)) == {
        "bbox": pytest.approx(metrics["bbox"], nan_ok=True, rel=0, abs=0)
    }
    assert (tmp_path / "eval" / RESULTS_FILE).is_file()
    assert (tmp_path / "eval" / "predictions.png").is_file()


def test_autocast_and_the_plain_network_train_too(arguments, tmp_path):
    opts = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.MAX_ITER", "2")
    opts += ("DATASETS.TEST", "()")
    for number, reversible in enumerate(("True", "False")):
        folder = tmp_path / str(number)
        output = ("OUTPUT_DIR", str(folder), "MODEL.DR2NET.REVERSIBLE", reversible)
        assert engine.run(arguments(*opts, *output)) == {}
        assert (folder / "model_final.pth").is_file()
        assert (folder / "curves.png").is_file()


def test_an_unknown_clip_type_is_refused(tiny_cfg):
    clip = "SOLVER.CLIP_GRADIENTS."
    cfg = tiny_cfg(f"{clip}ENABLED", "True", f"{clip}CLIP_TYPE", "agc")
    with pytest.raises(ConfigError, match=r"CLIP_TYPE is 'agc'; use 'value', 'norm'"):
        build_optimizer(cfg, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_clipping(tiny_cfg, kind):
    clip = "SOLVER.CLIP_GRADIENTS."
    cfg = tiny_cfg(f"{clip}ENABLED", "True", f"{clip}CLIP_TYPE", kind, f"{clip}CLIP_VALUE", "1.0")
    model = torch.nn.ParameterList(torch.zeros(2) for _ in range(2))
    optimizer = build_optimizer(cfg, model)
    for parameter, grad in zip(model, ([3.0, 4.0], [0.0, 12.0]), strict=True):
        parameter.grad = torch.tensor(grad)
    optimizer.step()
    expected = {
        "value": [[1.0, 1], [0, 1]],
        "norm": [[0.6, 0.8], [0, 1]],
        "full_model": [[3 / 13, 4 / 13], [0, 12 / 13]],
    }[kind]
    torch.testing.assert_close(torch.stack([p.grad for p in model]), torch.tensor(expected))


@pytest.mark.parametrize(
    ("opts", "options", "named"),
    [
        (["MODEL.DEVICE", "tpu"], {}, ["MODEL.DEVICE", "'tpu'", "MODEL.DEVICE to cpu"]),
        (["MODEL.DEVICE", "cuda:99"], {}, ["MODEL.DEVICE", "'cuda:99'", "MODEL.DEVICE to cpu"]),
        ([], {"num_gpus": 2}, ["--num-gpus", "2", "one device"]),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], {}, ["NUM_CLASSES is 80", "set it to 10"]),
        (["DATASETS.TRAIN", "()"], {}, ["DATASETS.TRAIN", "name a dataset"]),
        (["DATASETS.TRAIN", "('no_such',)"], {}, ["'no_such'", "small_digits_train"]),
        (["DATASETS.TEST", "('small_digits_val', 'small_digits_val')"], {}, ["DATASETS.TEST"]),
        (["DATASETS.TEST", "()"], {"eval_only": True}, ["DATASETS.TEST", "name one"]),
        ([], {"eval_only": True}, ["MODEL.WEIGHTS", "--resume"]),
        (["MODEL.WEIGHTS", "nothing.pth"], {}, ["'nothing.pth'", "MODEL.WEIGHTS"]),
        (["SOLVER.OPTIMIZER", "Lion"], {}, ["SOLVER.OPTIMIZER", "'Lion'", "'AdamW'"]),
        (
            ["SOLVER.OPTIMIZER", "SGD", "SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"],
            {},
            ["SOLVER", "momentum"],
        ),
        (["SOLVER.WEIGHT_DECAY", "-1.0"], {}, ["SOLVER.WEIGHT_DECAY", "-1.0", "at least 0"]),
        (["MODEL.DR2NET.SCHEDULE.KIND", "sudden"], {}, ["MODEL.DR2NET.SCHEDULE", "'sudden'"]),
        (["MODEL.VIT.NUM_HEADS", "5"], {}, ["MODEL.VIT", "num_heads 5"]),
        (["SOLVER.MAX_ITER", "soon"], {}, ["command line", "SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER"], {}, ["KEY VALUE"]),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(arguments, tmp_path, opts, options, named):
    folder = tmp_path / "output"
    with pytest.raises(UserError) as caught:
        engine.run(arguments("OUTPUT_DIR", str(folder), *opts, **options))
    message = str(caught.value)
    assert [word for word in named if word not in message] == []
    assert "\n" not in message
    assert not folder.exists()


def test_weights_of_another_model_are_refused(finished, arguments, tmp_path):
    folder, _ = finished
    opts = ("MODEL.WEIGHTS", str(folder / "model_final.pth"), "MODEL.FPN.OUT_CHANNELS", "24")
    output = tmp_path / "output"
    with pytest.raises(WeightsError, match="simfp"):
        engine.run(arguments(*opts, "OUTPUT_DIR", str(output)))
    assert not output.exists()


def test_a_checkpoint_of_another_training_is_refused(finished, arguments, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    output = ("OUTPUT_DIR", str(tmp_path / "copy"))
    with pytest.raises(WeightsError, match="does not continue this training"):
        engine.run(arguments(*output, "SOLVER.LAYER_DECAY", "0.5", resume=True))


def test_an_output_folder_that_cannot_be_made(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        engine.run(arguments("OUTPUT_DIR", str(tmp_path / "file" / "output")))


def test_limits_below_the_densest_image_are_one_warning_a_phase(arguments, tmp_path, caplog):
    """Canvases of 3 digits on average have up to 4."""
    counts = {
        name: load_split(f"small_digits_{name}_s64_d3").content for name in ("train_n8", "val_n4")
    }
    most = {name: max(map(len, (r.boxes for r in c.records))) for name, c in counts.items()}
    options = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "2", "TEST.DETECTIONS_PER_IMAGE", "1")
    short = ("SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path / "output"))
    engine.run(arguments(*options, *short))
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition("; ")[0] for text in found if "objects" in text] == [
        f"small_digits_train_n8_s64_d3 has an image with {most['train_n8']} objects, but "
        "MODEL.RPN.POST_NMS_TOPK_TRAIN is 2",
        f"small_digits_val_n4_s64_d3 has an image with {most['val_n4']} objects, but "
        "TEST.DETECTIONS_PER_IMAGE is 1",
    ]


def test_a_report_has_the_metrics_of_the_training(finished, tmp_path):
    folder, metrics = finished
    shutil.copytree(folder, tmp_path / "copy")
    assert report.main([str(tmp_path / "copy"), "--images", "1"]) == 0
    found = json.loads((tmp_path / "copy/report/report.json").read_text())["metrics"]
    expected = {name: None if math.isnan(v) else v for name, v in metrics["bbox"].items()}
    assert found == pytest.approx(expected)
