"""The shipped configs: YAML and LazyConfig agree, and each trains, resumes and evaluates."""

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from dr2net_d2.commands import load_config
from dr2net_d2.d2 import engine, register_dataset, run
from dr2net_d2.d2.lazy_experiment import load_lazy_config
from dr2net_d2.errors import ConfigError
from dr2net_d2.training.optimizer import build_optimizer
from dr2net_d2.tv.engine import run as run_torchvision

CONFIGS = Path(__file__).parents[2] / "configs"
YAMLS = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("Base-"))
LAZIES = sorted(path for path in CONFIGS.rglob("*.py") if path.parent.name != "common")
PAIRS = [path for path in LAZIES if path.parent.name != "quick_schedules"]


def name(path):
    return str(path.relative_to(CONFIGS))


def plain_attributes(model):
    """The thresholds, sizes and loss weights that a detector's modules keep as Python values."""

    def plain(value):
        if isinstance(value, (int, float, str)):
            return value
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [plain(item) for item in value]
        return plain(vars(value)) if type(value).__module__.startswith("detectron2") else None

    return {
        f"{path}.{key}": plain(value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        # loss_weight may leave out losses, whose weight is then 1.
        if key[0] != "_" and key not in ("lean", "loss_weight", "size_divisibility", "vis_period")
    }


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_both_styles_of_a_config_mean_the_same(path):
    cfg = load_config(str(path.with_suffix(".yaml")), ["MODEL.DEVICE", "meta"], "detectron2")
    lazy = load_lazy_config(str(path), [])
    with torch.device("meta"):
        built, instantiated = build_model(cfg), instantiate(lazy.model)
    shapes = [
        {key: tensor.shape for key, tensor in model.state_dict().items()}
        for model in (built, instantiated)
    ]
    assert shapes[0] == shapes[1]
    assert plain_attributes(built) == plain_attributes(instantiated)

    optimizer = build_optimizer(cfg, built)
    lazy.optimizer.params.model = instantiated
    settings = []
    for model, groups in (
        (built, optimizer.param_groups),
        (instantiated, instantiate(lazy.optimizer).param_groups),
    ):
        names = {parameter: key for key, parameter in model.named_parameters()}
        settings.append(
            {
                f"{names[parameter]} {key}": group[key]
                for key in ("lr", "weight_decay")
                for group in groups
                for parameter in group["params"]
            }
        )
    assert settings[0] == pytest.approx(settings[1])

    scheduler, multiplier = build_lr_scheduler(cfg, optimizer), instantiate(lazy.lr_multiplier)
    max_iter = cfg.SOLVER.MAX_ITER
    assert max_iter == lazy.train.max_iter
    for iteration in (0, 100, 300, *(step + i for step in cfg.SOLVER.STEPS for i in (-1, 1))):
        scheduler.last_epoch = iteration
        factor = scheduler.get_lr()[0] / scheduler.base_lrs[0]
        assert factor == pytest.approx(multiplier(iteration / max_iter)), iteration
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.amp.enabled == cfg.SOLVER.AMP.ENABLED


TRAIN, TEST = "small_digits_train_n8_s64_d3", "small_digits_val_n4_s64_d3"
SMALL_BACKBONES = {
    "swin": "SWIN: {EMBED_DIM: 8, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW_SIZE: 4, "
    "SQUARE_PAD: 64}",
    "mvitv2": "MVIT: {EMBED_DIM: 8, DEPTH: 5, LAST_BLOCK_INDEXES: [0, 1, 3, 4], IMG_SIZE: 64, "
    "ADAPTIVE_WINDOW_SIZE: 8, SQUARE_PAD: 64}",
    "": "VIT: {IMG_SIZE: 64, EMBED_DIM: 32, DEPTH: 4, NUM_HEADS: 4, WINDOW_SIZE: 3, "
    "WINDOW_BLOCK_INDEXES: [0, 1], PRETRAIN_IMG_SIZE: 32, SQUARE_PAD: 64}",
}
SMALL_YAML = """
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  {backbone}
  FPN: {OUT_CHANNELS: 64}
  RPN: {PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 30, PRE_NMS_TOPK_TEST: 50,
        POST_NMS_TOPK_TEST: 30}
  ROI_HEADS: {NUM_CLASSES: 10, BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {CONV_DIM: 8, FC_DIM: 16, FED_LOSS_NUM_CLASSES: 5}
  ROI_MASK_HEAD: {CONV_DIM: 8}
  RETINANET: {NUM_CLASSES: 10, SCORE_THRESH_TEST: 0.0}
  FCOS: {NUM_CLASSES: 10, SCORE_THRESH_TEST: 0.0}
INPUT:
  MIN_SIZE_TRAIN: [64]
  MAX_SIZE_TRAIN: 64
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 64
  LSJ: {IMAGE_SIZE: 64}
DATALOADER: {NUM_WORKERS: 0, FILTER_EMPTY_ANNOTATIONS: False}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 4, STEPS: [], CHECKPOINT_PERIOD: 4, AMP: {ENABLED: False}}
TEST: {EVAL_PERIOD: 0, EXPECTED_RESULTS: [], DETECTIONS_PER_IMAGE: 10}
"""
SMALL_LAZY = """
from detectron2.config import LazyConfig
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec

globals().update(LazyConfig.load("{path}"))
train.update(device="cpu", init_checkpoint="", max_iter=4, eval_period=0, expected_results=())
train.checkpointer.period = 4
train.amp.enabled = False
if "milestones" in lr_multiplier.scheduler:
    lr_multiplier.scheduler.milestones = [2, 3]
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.dataset.update(names="{train}", filter_empty=False)
small = dict(target_height=64, target_width=64, crop_size=(64, 64), short_edge_length=64)
for augmentation in dataloader.train.mapper.augmentations:
    augmentation.update({{key: small[key] for key in augmentation if key in small}})
del small, augmentation
dataloader.test.dataset.names = "{test}"
dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations[0].update(short_edge_length=64, max_size=64)
model.backbone.square_pad = 64
model.backbone.net.update(
    img_size=64, embed_dim=32, depth=4, num_heads=4, window_size=3, window_block_indexes=[0, 1],
    pretrain_img_size=32,
)
if "roi_heads" in model:
    model.proposal_generator.update(pre_nms_topk=(50, 50), post_nms_topk=(30, 30))
    model.roi_heads.update(num_classes=10, batch_size_per_image=16)
    for name, value in (
        ("box_head", dict(conv_dims=[8], fc_dims=[16])),
        ("box_predictor", dict(input_shape=ShapeSpec(channels=16), fed_loss_num_classes=5,
                               test_score_thresh=0.0, test_topk_per_image=10)),
        ("mask_head", dict(conv_dims=[8, 8])),
    ):
        for head in model.roi_heads.get(name + "s", [model.roi_heads.get(name)]):
            None if head is None else head.update(value)
    del head, value
    dataloader.evaluator._target_ = COCOEvaluator
else:
    model.update(num_classes=10, test_score_thresh=0.0, max_detections_per_image=10)
    model.head.conv_dims = [64]
"""


@pytest.fixture
def reduced(tmp_path):
    """Derives a config from a shipped one, as a user would, small enough for a CPU."""
    register_dataset(TRAIN)
    metadata = MetadataCatalog.get(TRAIN)
    if not hasattr(metadata, "class_image_count"):
        # The federated loss of LVIS weights classes by their numbers of images.
        metadata.class_image_count = [{"id": i, "image_count": i + 1} for i in range(10)]

    def reduce(path):
        small = tmp_path / f"small{path.suffix}"
        if path.suffix == ".py":
            values = {"path": path, "train": TRAIN, "test": TEST}
            small.write_text(SMALL_LAZY.format(**values))
        else:
            datasets = f"DATASETS: {{TRAIN: [{TRAIN}], TEST: [{TEST}]}}\n"
            backbone = next(text for kind, text in SMALL_BACKBONES.items() if kind in path.name)
            text = SMALL_YAML.replace("{backbone}", backbone)
            small.write_text(f"_BASE_: {path}\n{text}{datasets}")
        return small

    return reduce


def arguments(config, output, *, longer=False, **flags):
    """The parsed arguments of train_net.py."""
    if config.suffix == ".py":
        opts = [f"train.output_dir={output}", "train.seed=1", *(["train.max_iter=5"] * longer)]
    else:
        opts = ["OUTPUT_DIR", str(output), "SEED", "1", *(["SOLVER.MAX_ITER", "5"] * longer)]
    flags = {"eval_only": False, "resume": False, "num_gpus": 1, "num_machines": 1, **flags}
    return argparse.Namespace(
        config_file=str(config), opts=opts, machine_rank=0, dist_url="auto", **flags
    )


def losses(output):
    rows = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


@pytest.mark.parametrize("path", [*YAMLS, *LAZIES], ids=name)
def test_a_config_trains_resumes_and_evaluates_with_detectron2(
    path, reduced, tmp_path, monkeypatch
):
    # Pictures would take half of the time, and have tests of their own.
    for picture in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(engine, picture, lambda *_: None)
    config, output = reduced(path), tmp_path / "output"
    run(arguments(config, output))
    assert math.isfinite(losses(output)[3])
    trained = run(arguments(config, output, longer=True, resume=True))
    assert sorted(losses(output)) == [3, 4]
    evaluated = run(arguments(config, output, eval_only=True, resume=True))
    assert evaluated.keys() == trained.keys() != set()
    for task, metrics in trained.items():
        assert evaluated[task] == pytest.approx(metrics, nan_ok=True)
    assert ("segm" in trained) == ("mask" in path.name)
    for file in ("config.yaml", "log.txt", "model_final.pth"):
        assert (output / file).is_file()


@pytest.mark.parametrize("path", [*YAMLS, *LAZIES], ids=name)
def test_a_config_trains_with_torchvision_or_is_refused_by_key(path, reduced, tmp_path):
    config, output = reduced(path), tmp_path / "output"
    if path.name in ("quickstart.yaml", "faster_rcnn_vitdet_b.yaml"):
        run_torchvision(arguments(config, output))
        run_torchvision(arguments(config, output, longer=True, resume=True))
        assert "bbox" in run_torchvision(arguments(config, output, eval_only=True, resume=True))
    else:
        key = "is a LazyConfig" if path.suffix == ".py" else r"MODEL\.|DATALOADER\."
        with pytest.raises(ConfigError, match=key):
            run_torchvision(arguments(config, output))
        assert not output.exists()


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_a_lazy_training_that_was_cut_off_ends_with_the_same_weights(reduced, tmp_path, kind):
    config = reduced(CONFIGS / "COCO-Detection" / f"{kind}_vitdet_b.py")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    args = arguments(config, whole)
    args.opts += ["train.checkpointer.period=2", "train.max_iter=4"]
    run(args)
    resumed.mkdir()
    shutil.copy(whole / "model_0000001.pth", resumed)
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    args.opts[0], args.resume = f"train.output_dir={resumed}", True
    run(args)
    expected, found = (torch.load(folder / "model_final.pth") for folder in (whole, resumed))
    for key, tensor in expected["model"].items():
        assert torch.equal(found["model"][key], tensor), key
