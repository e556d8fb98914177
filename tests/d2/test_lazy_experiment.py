"""LazyConfigs: Detectron2's own with two words changed, and mistakes in one's own config."""

import argparse
import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.backbone import vit as stock

from dr2net_d2.d2 import Dr2NetBackbone, Dr2NetPyramid, lazy_experiment, run
from dr2net_d2.d2.lazy_experiment import LazyExperiment, load_lazy_config
from dr2net_d2.d2.sliced_detector import SlicedDetector
from dr2net_d2.d2.zoo import zoo_config
from dr2net_d2.errors import ConfigError, DatasetError, WeightsError
from tests.d2.tiny import batch

CONFIG = Path(__file__).parents[2] / "configs/COCO-InstanceSegmentation/mask_rcnn_vitdet_b.py"


def small_backbone(**changes):
    """The config of Detectron2's own ViTDet backbone, made small."""
    backbone = zoo_config("common/models/mask_rcnn_vitdet.py").model.backbone
    backbone.square_pad = 64
    backbone.net.update(
        img_size=64, embed_dim=32, depth=2, num_heads=4, window_size=3, window_block_indexes=[0],
        pretrain_img_size=32, drop_path_rate=0.0,
    )  # fmt: skip
    backbone.update(changes)
    return backbone


@pytest.mark.parametrize(
    "targets",
    [
        (Dr2NetPyramid, Dr2NetBackbone),
        ("dr2net_d2.d2.Dr2NetPyramid", "dr2net_d2.d2.Dr2NetBackbone"),
    ],
    ids=["classes", "names"],
)
def test_two_words_make_the_stock_backbone_reversible(targets):
    config = small_backbone()
    torch.manual_seed(0)
    theirs = instantiate(config)
    config._target_, config.net._target_ = targets
    ours = instantiate(config)
    assert type(ours.net) is Dr2NetBackbone
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.output_shape() == theirs.output_shape()
    image = torch.randn(1, 3, 64, 64)
    expected = theirs(image)
    for name, level in ours(image).items():
        torch.testing.assert_close(level, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "BN"}, "norm is 'BN'"),
        ({"in_feature": "res4"}, "in_feature 'res4'.*reads 'last_feat'"),
        ({"scale_factors": (2.0, 1.0)}, r"top_block reads 'p5'; use one of \['p3', 'p4'\]"),
    ],
)
def test_arguments_that_the_pyramid_does_not_have(changes, message):
    config = small_backbone(_target_=Dr2NetPyramid, **changes)
    config.net._target_ = Dr2NetBackbone
    with pytest.raises(ValueError, match=message):
        instantiate(config)


def test_stock_models_of_a_config_are_not_cut_at_their_square(tmp_path):
    source = OWN + (
        "from detectron2.modeling import SimpleFeaturePyramid, ViT\n"
        "model.backbone._target_, model.backbone.net._target_ = SimpleFeaturePyramid, ViT\n"
        "model.backbone.net.update(embed_dim=32, depth=1, num_heads=2, window_block_indexes=[])\n"
        "model.backbone.square_pad = 64\n"
        "model.roi_heads.num_classes = 10\n"
        "dataloader.test.dataset.names = 'small_digits_val_n4_s64_d3'\n"
        "train.amp.enabled = False\n"
    )
    experiment = LazyExperiment(arguments(tmp_path, source, eval_only=True))
    assert issubclass(type(experiment.model.backbone), stock.SimpleFeaturePyramid)
    images = experiment.model.preprocess_image(batch((64, 100)))
    assert images.tensor.shape[-2:] == (64, 128)


def arguments(folder, source, *opts, weights=__file__, **flags):
    """The arguments of train_net.py for a config with this source, and any file as weights."""
    path = folder / "own.py"
    path.write_text(source)
    opts = ["train.device=cpu", f"train.output_dir={folder / 'output'}", *opts]
    opts.append(f"train.init_checkpoint={weights}")
    flags = {"eval_only": False, "resume": False, "num_gpus": 1, "num_machines": 1, **flags}
    return argparse.Namespace(
        config_file=str(path), opts=opts, machine_rank=0, dist_url="auto", **flags
    )


OWN = (
    "from detectron2.config import LazyConfig\n"
    f"globals().update(LazyConfig.load({str(CONFIG)!r}))\n"
)
DIGITS = (
    "names = 'small_digits_val_n4_s64_d3'\n"
    "dataloader.train.dataset.names = dataloader.test.dataset.names = names\n"
    "train.amp.enabled = False\n"
)
BOXES = "COCO-Detection/faster_rcnn_vitdet_b.py"
SMALL = "model.backbone.net.update(embed_dim=32, depth=1, num_heads=2, window_block_indexes=[])\n"
CLASSES = "model.roi_heads.num_classes = 10\n"
READY = OWN + DIGITS + SMALL + CLASSES
REFUSED = {
    "syntax": ("model = (", (), r"own.py: SyntaxError"),
    "import": ("import nothing_of_that_name", (), r"own.py: ModuleNotFoundError: .*nothing_of"),
    "optimizer": (OWN + "del optimizer", (), r"lacks 'optimizer.params'"),
    "a field": (OWN + "del train['max_iter']", (), r"lacks 'train.max_iter'"),
    "yaml words": (READY, ("SOLVER.MAX_ITER", "3"), r"'SOLVER.MAX_ITER': .* key=value"),
    "unknown key": (READY, ("train.max_itr=3",), r"'train.max_itr', which does not.*max_iter"),
    "unknown node": (READY, ("trian.max_iter=3",), r"'trian.max_iter', which does not exist"),
    "unknown argument": (READY, ("model.backbone.net.depht=3",), r"^model: TypeError: .*depht"),
    "classes": (OWN + DIGITS, (), r"model.roi_heads.num_classes is 80, .* set it to 10"),
    "batch": (READY, ("dataloader.train.total_batch_size=0",), r"total_batch_size is 0"),
    "steps": (READY, ("train.accumulation_steps=5",), r"is 64; .*5 accumulation steps"),
    "device": (READY, ("train.device=gpu",), r"train.device is 'gpu'"),
    "float16": (READY, ("train.amp.enabled=True",), r"float16 is for GPUs"),
    "decay": (READY, ("train.ema_decay=1.0",), r"train, dr2net: ValueError: ema_decay is 1.0"),
    "schedule": (READY, ("dr2net.schedule.kind=cos",), r"train, dr2net: .*'cos'"),
    "lean": (READY, ("dr2net.lean=[heads]",), r"model: ValueError: .*heads"),
    "lr": (READY, ("train.max_iter=2",), r"^lr_multiplier: "),
    "model": (READY + "model.backbone.net.num_heads = 5", (), r"model: ValueError: .*num_heads 5"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "opts", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_a_config_error_before_anything_is_written(tmp_path, source, opts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(arguments(tmp_path, source, *opts))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "output").exists()


def test_a_config_that_is_not_there_a_dataset_and_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"'absent.py' does not exist"):
        load_lazy_config("absent.py", [])
    with pytest.raises(DatasetError, match=r"'digits' is not known"):
        run(arguments(tmp_path, READY + "dataloader.test.dataset.names = 'digits'"))
    with pytest.raises(WeightsError, match=r"'absent.pth' do not exist"):
        run(arguments(tmp_path, READY, weights="absent.pth"))
    with pytest.raises(ConfigError, match=r"without weights: set train.init_checkpoint"):
        run(arguments(tmp_path, READY, weights="", eval_only=True))


def test_optional_fields_and_new_arguments_can_be_overridden(tmp_path):
    opts = ("train.seed=3", "train.amp.dtype=bfloat16", "model.backbone.net.reversible=False")
    cfg = load_lazy_config(arguments(tmp_path, READY).config_file, opts)
    assert (cfg.train.seed, cfg.train.amp.dtype) == (3, "bfloat16")
    assert cfg.model.backbone.net.reversible is False


TILES = """
from detectron2.config import LazyCall as L
from dr2net_d2.d2.data import tile_dicts
from dr2net_d2.data.tiling import Grid
from dr2net_d2.data.slicing import Slicing

large = "small_digits_val_n1_s128_d6"
dataloader.train.dataset = L(tile_dicts)(names=large, size=64, min_visible=0.5)
dataloader.test.dataset.names = large
dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations[0].update(short_edge_length=48, max_size=48)
dr2net.slicing = L(Slicing)(grid=L(Grid)(size=64, overlap=0.25), max_detections=50)
"""


def test_limits_are_those_of_images_and_not_of_tiles(tmp_path, caplog):
    source = READY.replace(str(CONFIG), str(CONFIG.parents[1] / BOXES)) + TILES
    source += "model.proposal_generator.post_nms_topk = (1, 1)\ndr2net.slicing.max_detections = 2\n"
    logging.getLogger("dr2net_d2").propagate = True
    with caplog.at_level(logging.WARNING):
        LazyExperiment(arguments(tmp_path, source)).warn()
    messages = {record.getMessage() for record in caplog.records}
    (found,) = [message for message in messages if "objects" in message]
    assert " objects, but dr2net.slicing.max_detections is 2; " in found


def test_tiles_are_trained_on_and_evaluated_in(tmp_path, monkeypatch):
    source = READY.replace(str(CONFIG), str(CONFIG.parents[1] / BOXES)) + TILES
    experiment = LazyExperiment(arguments(tmp_path, source))
    tiles = instantiate(experiment.cfg.dataloader.train.dataset)
    assert 3 < len(tiles) <= 9 and all("tile" in row for row in tiles)

    evaluated = []
    monkeypatch.setattr(
        lazy_experiment, "inference_on_dataset", lambda *args: evaluated.append(args) or {}
    )
    experiment.evaluate(experiment.model, True)
    ((model, loader, _),) = evaluated
    assert isinstance(model, SlicedDetector) and model.model is experiment.model
    assert (model.slicing.grid.size, model.slicing.max_detections) == (64, 50)
    ((given,),) = loader
    assert given["image"].shape == (3, 128, 128)
    assert model._resized(given["image"][:, :64, :60])["image"].shape == (3, 48, 45)
    assert len(experiment.cfg.dataloader.test.mapper.augmentations) == 1


def test_masks_are_not_merged(tmp_path):
    with pytest.raises(ConfigError, match=r"finds masks as well"):
        LazyExperiment(arguments(tmp_path, READY + TILES))
