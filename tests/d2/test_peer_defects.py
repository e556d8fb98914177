"""Defects of Detectron2 and its ViTDet; each test shows that ours does not have it."""

import pickle
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.engine.hooks import TorchMemoryStats
from detectron2.modeling import build_backbone, build_model

from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.d2 import Dr2NetCheckpointer, PeakMemory, add_dr2net_config
from dr2net_d2.errors import ConfigError, WeightsError
from tests.d2.test_hooks import Loop
from tests.d2.tiny import batch, tiny_cfg, write_yaml

OURS, THEIRS = "build_dr2net_vitdet_backbone", "build_vitdet_backbone"
BOTH = pytest.mark.parametrize("name", [OURS, THEIRS])


def padded(folder, name, square, sizes):
    """The (height, width) to which a detector pads a batch of images of these sizes."""
    opts = ("MODEL.BACKBONE.NAME", name, "MODEL.VIT.SQUARE_PAD", square)
    images = build_model(tiny_cfg(folder, *opts)).preprocess_image(batch(*sizes))
    assert images.image_sizes == sizes
    return tuple(images.tensor.shape[-2:])


@BOTH
def test_vitdet_size_divisibility_is_spelled_right_and_heeded(tmp_path, name):
    """Detectron2's pyramid asks for ``size_divisiblity``, which nothing reads."""
    backbone = build_backbone(tiny_cfg(tmp_path, "MODEL.BACKBONE.NAME", name))
    assert backbone.padding_constraints == {"size_divisibility": 8}
    assert padded(tmp_path, name, 0, [(33, 50), (20, 61)]) == (40, 64)


@BOTH
@pytest.mark.parametrize(
    ("square", "sizes", "expected"),
    [
        (128, [(33, 50)], (128, 128)),
        (60, [(33, 50)], (64, 64)),
        (64, [(33, 100), (50, 10)], (64, 128)),
        (64, [(100, 33)], (128, 64)),
    ],
)
def test_vitdet_an_image_beyond_the_square_is_not_cropped(tmp_path, name, square, sizes, expected):
    assert padded(tmp_path, name, square, sizes) == expected


@pytest.mark.parametrize("key", ["MAX_SIZE_TRAIN", "MAX_SIZE_TEST"])
def test_vitdet_a_square_below_the_largest_image_is_refused(tmp_path, key):
    cfg = tiny_cfg(tmp_path, "MODEL.VIT.SQUARE_PAD", 64, f"INPUT.{key}", 65)
    message = f"INPUT.{key} is 65 .*SQUARE_PAD is 64.*lower the former"
    with pytest.raises(ConfigError, match=message):
        build_backbone(cfg)


@BOTH
def test_vitdet_from_yaml_in_a_default_predictor(tmp_path, name):
    """ViTDet's configs are LazyConfigs only; SAHI and the demo need YAML and this class."""
    cfg = get_cfg()
    add_dr2net_config(cfg)
    cfg.merge_from_file(write_yaml(tmp_path))
    cfg.MODEL.BACKBONE.NAME = name
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert len(instances) and instances.image_size == (48, 64)


def test_vitdet_needs_timms_old_layers_and_ours_does_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.layers", None)
    build_backbone(tiny_cfg(tmp_path, "MODEL.BACKBONE.NAME", OURS))
    with pytest.raises(ImportError, match=r"timm\.models\.layers"):
        build_backbone(tiny_cfg(tmp_path, "MODEL.BACKBONE.NAME", THEIRS))


def test_vitdet_keeps_the_activations_of_all_blocks(tmp_path):
    kept = []
    for name in (OURS, THEIRS):
        opts = ("MODEL.BACKBONE.NAME", name, "MODEL.VIT.DEPTH", 12, "MODEL.VIT.DROP_PATH_RATE", 0.0)
        vit = build_backbone(tiny_cfg(tmp_path, *opts)).net
        if name == OURS:
            vit.coefficients.set(0.5, 0.5)
        with count_saved_bytes(exclude=vit.parameters()) as saved:
            vit(torch.randn(1, 3, 64, 64))
        kept.append(saved.total)
    assert kept[0] < 0.1 * kept[1]


class Card:
    """A CUDA device's memory counters, as torch reports them."""

    def __init__(self, monkeypatch):
        self.peak = 0
        for name, value in {
            "is_available": lambda: True,
            "max_memory_allocated": lambda device=None: self.peak,
            "max_memory_reserved": lambda: self.peak,
            "memory_allocated": lambda: 0,
            "memory_reserved": lambda: 0,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            "dr2net_d2.d2.hooks.peak_memory_bytes", lambda device: torch.cuda.max_memory_allocated()
        )


def test_torch_memory_stats_resets_the_peak_and_ours_never_falls(monkeypatch):
    card = Card(monkeypatch)
    used = iter([3, 5, 1, 2])

    def allocate():
        card.peak = max(card.peak, next(used) * 2**20)

    model = torch.nn.Linear(2, 2)
    loop = Loop(PeakMemory(), TorchMemoryStats(period=2), model=model, watch=allocate)
    loop.train(0, 4)
    assert [row["memory/peak_mb"] for row in loop.scalars] == [(3, 0), (5, 1), (5, 2), (5, 3)]
    assert card.peak < 5 * 2**20


def test_suffix_matching_a_shape_mismatch_is_an_error_not_a_warning(tmp_path):
    """Detectron2 skips such a weight."""
    model = build_model(tiny_cfg(tmp_path, "MODEL.BACKBONE.NAME", OURS))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = {key: value.numpy() for key, value in model.backbone.net.state_dict().items()}
    weights["blocks.1.mlp.fc1.weight"] = np.zeros((96, 32), dtype=np.float32)
    content = {"model": weights, "matching_heuristics": True, "__author__": "Third Party"}
    path = tmp_path / "pretrained.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.weight is \(96, 32\)"):
        Dr2NetCheckpointer(model).load(str(path))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
