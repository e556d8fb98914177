"""``run``: what it writes and returns, how it resumes, and what it refuses before writing."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from dr2net_d2.d2 import run
from dr2net_d2.d2.hooks import CoefficientHook
from dr2net_d2.d2.lazy_experiment import LazyExperiment
from dr2net_d2.data import register_coco_json, resolve_dataset
from dr2net_d2.errors import ConfigError, DatasetError, UserError, WeightsError
from tests.d2.tiny import arguments, launch_one

RESULTS = Path("output", "inference", "coco_instances_results.json")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(folder, results) of a complete training of the tiny config."""
    folder = tmp_path_factory.mktemp("training")
    return folder, run(arguments(folder))


def weights(folder, name="model_final.pth"):
    return torch.load(folder / "output" / name)["model"]


def metrics(folder):
    """The rows of metrics.json with losses, by iteration."""
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines) if "total_loss" in row}


def test_a_training_leaves_the_files_of_detectron2_and_two_pictures(training):
    folder, results = training
    output = folder / "output"
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert files - events == {
        "config.yaml",
        "curves.png",
        "inference/coco_instances_results.json",
        "inference/instances_predictions.pth",
        "last_checkpoint",
        "log.txt",
        "metrics.json",
        "model_0000003.pth",
        "model_0000007.pth",
        "model_final.pth",
        "predictions.png",
    }
    last = metrics(folder)[7]
    assert {"lr", "time", "dr2net/alpha", "dr2net/beta", "dr2net/overflows"} <= last.keys()
    assert last["memory/peak_mb"] > 50
    assert last["dr2net/beta"] == 0.5
    assert 0.1 < last["dr2net/stream_peak"] < 1000
    log = (output / "log.txt").read_text()
    for text in ("iteration 0: alpha 0.9375, beta 0.0625", "Saved checkpoint", "AP50", "Model:"):
        assert text in log
    assert list(results) == ["bbox"]


def test_eval_only_repeats_the_last_evaluation(training, tmp_path):
    folder, results = training
    final = folder / "output" / "model_final.pth"
    again = run(arguments(tmp_path, "MODEL.WEIGHTS", final, eval_only=True))
    assert (tmp_path / RESULTS).read_text() == (folder / RESULTS).read_text()
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert (tmp_path / "output" / "predictions.png").is_file()
    assert not (tmp_path / "output" / "curves.png").exists()


class _CutOff(Exception):
    pass


def cut_off_at(monkeypatch, iteration):
    original = CoefficientHook.before_step

    def before_step(hook):
        if hook.trainer.iter == iteration:
            raise _CutOff
        original(hook)

    monkeypatch.setattr(CoefficientHook, "before_step", before_step)


@pytest.mark.parametrize("eval_period", [0, 3])
def test_a_resumed_training_ends_with_the_same_weights(
    training, tmp_path, monkeypatch, eval_period
):
    """Interrupted two iterations after the checkpoint, with other evaluations in between."""
    opts = ("TEST.EVAL_PERIOD", eval_period)
    with monkeypatch.context() as patch, pytest.raises(_CutOff):
        cut_off_at(patch, 6)
        run(arguments(tmp_path, *opts))
    results = run(arguments(tmp_path, *opts, resume=True))

    folder, expected_results = training
    for key, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(tmp_path)[key]), key
    assert results["bbox"] == pytest.approx(expected_results["bbox"], nan_ok=True)
    expected, actual = metrics(folder)[7], metrics(tmp_path)[7]
    assert actual["lr"] == expected["lr"]


def test_resume_in_an_empty_folder_starts_from_the_beginning(training, tmp_path):
    run(arguments(tmp_path, "SOLVER.MAX_ITER", 8, resume=True))
    for key, tensor in weights(training[0]).items():
        assert torch.equal(tensor, weights(tmp_path)[key]), key


def test_another_seed_gives_another_training(training, tmp_path):
    run(arguments(tmp_path, "SEED", 4))
    key = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(weights(training[0])[key], weights(tmp_path)[key])


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.DR2NET.ARITHMETIC", "float", "MODEL.DR2NET.SCHEDULE.START_BETA", 0.7),
        ("MODEL.BACKBONE.NAME", "build_vitdet_backbone"),
        ("DATASETS.TEST", ()),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 10,
         "MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4"]),
        ("SEED", -1, "DATALOADER.NUM_WORKERS", 1),
    ],
    ids=["float", "stock", "no_test_set", "clipped", "retinanet", "no_seed"],
)  # fmt: skip
def test_variants_train(tmp_path, opts):
    results = run(arguments(tmp_path, *opts, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0))
    assert math.isfinite(metrics(tmp_path)[1]["total_loss"])
    assert list(results) == ([] if opts == ("DATASETS.TEST", ()) else ["bbox"])


def test_two_processes_evaluate_like_one(training, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    folder, results = training
    opts = ("MODEL.WEIGHTS", folder / "output" / "model_final.pth")
    both = run(arguments(tmp_path, *opts, eval_only=True, num_gpus=2))
    assert both["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


def test_an_error_in_one_of_several_processes_is_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("dr2net_d2.d2.engine.launch", launch_one)
    with pytest.raises(DatasetError, match=r"^dataset 'digits' is not known"):
        run(arguments(tmp_path, "DATASETS.TRAIN", ("digits",), num_gpus=2))


CLIP = "SOLVER.CLIP_GRADIENTS"
REFUSED = {
    "config file": (ConfigError, r"'absent.yaml' does not", (), {"config_file": "absent.yaml"}),
    "unknown key": (ConfigError, r"MODEL.VITT", ("MODEL.VITT", 1), {}),
    "half a pair": (ConfigError, r"KEY VALUE pairs", ("SEED",), {}),
    "type": (ConfigError, r"SEED", ("SEED", "one"), {}),
    "no gpu": (ConfigError, r"'cuda', .*MODEL.DEVICE to cpu", ("MODEL.DEVICE", "cuda"), {}),
    "device": (ConfigError, r"DEVICE is 'gpu', which torch", ("MODEL.DEVICE", "gpu"), {}),
    "two gpus": (ConfigError, r"--num-gpus is 2, .* 0 CUDA GPUs.*use 1", (), {"num_gpus": 2}),
    "zero gpus": (ConfigError, r"--num-gpus is 0", (), {"num_gpus": 0}),
    "amp": (ConfigError, r"float16 is.*SOLVER.AMP.DTYPE", ("SOLVER.AMP.ENABLED", True), {}),
    "train set": (ConfigError, r"DATASETS.TRAIN is empty", ("DATASETS.TRAIN", ()), {}),
    "test set": (ConfigError, r"TEST is empty", ("DATASETS.TEST", ()), {"eval_only": True}),
    "dataset": (DatasetError, r"'digits' is not known", ("DATASETS.TRAIN", ("digits",)), {}),
    "coco": (DatasetError, r"DETECTRON2_DATASETS", ("DATASETS.TEST", ("coco_2017_val",)), {}),
    "classes": (ConfigError, r"is 80, .*set it to 10", ("MODEL.ROI_HEADS.NUM_CLASSES", 80), {}),
    "other classes": (ConfigError, r"letters has other", ("DATASETS.TEST", ("letters",)), {}),
    "weights": (WeightsError, r"'absent.pth' do not exist", ("MODEL.WEIGHTS", "absent.pth"), {}),
    "package": (WeightsError, r"nano.* do not exist", ("MODEL.WEIGHTS", "dr2net_d2://nano"), {}),
    "no weights": (ConfigError, r"--eval-only without weights", (), {"eval_only": True}),
    "vit": (ConfigError, r"MODEL.VIT.*num_heads 5", ("MODEL.VIT.NUM_HEADS", 5), {}),
    "backbone": (ConfigError, r"MODEL: .*build_vit'", ("MODEL.BACKBONE.NAME", "build_vit"), {}),
    "features": (ConfigError, r"MODEL: .*p7", ("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p7"]), {}),
    "square": (ConfigError, r"SQUARE_PAD", ("MODEL.VIT.SQUARE_PAD", 32), {}),
    "schedule": (ConfigError, r"SCHEDULE: .*'cos'", ("MODEL.DR2NET.SCHEDULE.KIND", "cos"), {}),
    "optimizer": (ConfigError, r"OPTIMIZER is 'Lion'", ("SOLVER.OPTIMIZER", "Lion"), {}),
    "lr schedule": (ConfigError, r"SOLVER: .*Linear", ("SOLVER.LR_SCHEDULER_NAME", "Linear"), {}),
    "clipping": (ConfigError, r"CLIP_TYPE is .all.",
                 (f"{CLIP}.ENABLED", True, f"{CLIP}.CLIP_TYPE", "all"), {}),
    "batch": (ConfigError, r"SOLVER.IMS_PER_BATCH is 0", ("SOLVER.IMS_PER_BATCH", 0), {}),
    "length": (ConfigError, r"SOLVER: max_iter is 0", ("SOLVER.MAX_ITER", 0), {}),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
@pytest.mark.parametrize(("error", "message", "opts", "flags"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, error, message, opts, flags
):
    monkeypatch.chdir(tmp_path)
    DatasetCatalog.register("letters", lambda: [])
    MetadataCatalog.get("letters").thing_classes = list("abcdefghij")
    args = arguments(tmp_path, *opts)
    for name, value in flags.items():
        setattr(args, name, value)
    with pytest.raises(error, match=message) as caught:
        run(args)
    assert issubclass(error, UserError)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_a_dataset_error_with_its_name(tmp_path, workers):
    json_file, image_root = resolve_dataset("small_digits_train_n8_s64_d3")
    images = shutil.copytree(image_root, tmp_path / "images")
    for image in images.iterdir():
        image.write_bytes(image.read_bytes()[:100])
    register_coco_json(f"cut_{workers}", json_file, images)
    opts = ("DATASETS.TRAIN", (f"cut_{workers}",), "DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(DatasetError, match=r"image .*images.*png cannot be used \(image file is"):
        run(arguments(tmp_path, *opts))


def test_an_output_dir_that_cannot_be_written_is_a_config_error(tmp_path):
    (tmp_path / "output").write_text("a file")
    with pytest.raises(ConfigError, match=r"output folder .*cannot be written"):
        run(arguments(tmp_path))


def test_a_pretrained_backbone_is_no_detector_to_evaluate(training, tmp_path):
    state = {key: value for key, value in weights(training[0]).items() if ".net." in key}
    torch.save(
        {key.partition(".net.")[2]: value for key, value in state.items()}, tmp_path / "vit.pth"
    )
    with pytest.raises(WeightsError, match=r"they are a backbone or another model"):
        run(arguments(tmp_path, "MODEL.WEIGHTS", tmp_path / "vit.pth", eval_only=True))


def test_a_checkpoint_that_does_not_continue_the_training_is_a_weights_error(training, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_final.pth")
    saved = torch.load(training[0] / "output" / "model_final.pth")
    torch.save({"model": saved["model"], "optimizer": {}}, output / "model_final.pth")
    with pytest.raises(WeightsError, match=r"model_final.pth was not written by Detectron2"):
        run(arguments(tmp_path, resume=True))
    torch.save(saved, output / "model_final.pth")
    with pytest.raises(WeightsError, match=r"does not continue this training .*parameter group"):
        run(arguments(tmp_path, "SOLVER.LAYER_DECAY", 1.0, resume=True))
    with pytest.raises(WeightsError, match=r"do not fit.*embed_dim is 32.*64|is \(.*32"):
        run(arguments(tmp_path, "MODEL.VIT.EMBED_DIM", 64, resume=True))
    (output / "model_final.pth").unlink()
    with pytest.raises(WeightsError, match=r"do not exist"):
        run(arguments(tmp_path, resume=True))


def test_limits_below_the_densest_image_are_one_warning_a_phase(tmp_path):
    options = ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 2, "MODEL.RPN.POST_NMS_TOPK_TEST", 1)
    run(arguments(tmp_path, *options, "SOLVER.MAX_ITER", 1))
    log = (tmp_path / "output" / "log.txt").read_text()
    most = {}
    for name in ("small_digits_train_n8_s64_d3", "small_digits_val_n4_s64_d3"):
        most[name] = max(len(row["annotations"]) for row in DatasetCatalog.get(name))
    keys = ("MODEL.RPN.PRE_NMS_TOPK_TRAIN is 2", "MODEL.RPN.POST_NMS_TOPK_TEST is 1")
    expected = [
        f"{name} has an image with {count} objects, but {key}"
        for (name, count), key in zip(most.items(), keys, strict=True)
    ]
    assert re.findall(r"WARNING: (.* objects, but [^;]*)", log) == expected


def test_a_lazy_config_is_warned_by_what_its_model_has(tmp_path, caplog):
    config = "configs/quick_schedules/mask_rcnn.py"
    words = ["model.proposal_generator.pre_nms_topk=[2,300]"]
    words += ["model.roi_heads.box_predictor.test_topk_per_image=1", "train.init_checkpoint="]
    for split, name in (
        ("train", "small_digits_train_n8_s64_d3"),
        ("test", "small_digits_val_n4_s64_d3"),
    ):
        words.append(f"dataloader.{split}.dataset.names={name}")
    args = arguments(tmp_path)
    args.config_file, args.opts = str(Path(__file__).parents[2] / config), words
    logging.getLogger("dr2net_d2").propagate = True
    with caplog.at_level(logging.WARNING):
        LazyExperiment(args).warn()
    # A logger that other tests have detached from its parents also has caplog's handler itself.
    found = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert len(found) == 2
    assert " objects, but model.proposal_generator.pre_nms_topk is 2; " in found[0]
    assert " objects, but model.roi_heads.box_predictor.test_topk_per_image is 1; " in found[1]
