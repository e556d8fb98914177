"""Lean parts of Detectron2's detectors against Detectron2's own, on the same weights."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dr2net_d2.commands import load_config
from dr2net_d2.config import LEAN_PARTS
from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.d2 import detector as lean
from dr2net_d2.d2 import make_lean
from dr2net_d2.d2.replacement import Replacement, replace_modules
from dr2net_d2.d2.yaml_experiment import YamlExperiment
from dr2net_d2.errors import ConfigError
from tests.d2.tiny import arguments, batch, tiny_cfg

# The heads of Base-ViTDet.yaml, with masks.
HEADS = (
    "MODEL.VIT.DROP_PATH_RATE", 0.0,
    "MODEL.RPN.CONV_DIMS", [-1, -1],
    # Few samples for maps of 336 positions, so that the RPN is sparse.
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8,
    "MODEL.ROI_BOX_HEAD.NUM_CONV", 4,
    "MODEL.ROI_BOX_HEAD.NORM", "LN",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", 16,
    "MODEL.MASK_ON", True,
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
    "MODEL.ROI_MASK_HEAD.NORM", "LN",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 6,
)  # fmt: skip
CASCADE = (
    *HEADS,
    "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
)  # fmt: skip


def detector(folder, *opts, parts=()):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(folder, "MODEL.DR2NET.LEAN", [], *HEADS, *opts))
    return make_lean(model.train(), parts)


def images(objects=3):
    inputs = batch((64, 56), (48, 64), objects=objects)
    for row in inputs:
        size = (row["height"], row["width"])
        masks = torch.rand(objects, *size) > 0.5
        row["instances"].gt_masks = BitMasks(masks)
    return inputs


def step(model, inputs, precision="float32"):
    """(losses, gradients, bytes saved for the backward)."""
    torch.manual_seed(1)
    with (
        EventStorage(),
        count_saved_bytes(model.parameters()) as saved,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        losses = model(inputs)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, saved.total


def distance(gradients, expected):
    """The largest relative distance of a gradient from the expected one."""
    assert gradients.keys() == expected.keys()
    return max(
        float((gradients[name] - g).norm() / g.norm().clamp(min=1e-9))
        for name, g in expected.items()
    )


@pytest.mark.parametrize("parts", [(), ("pyramid",), ("rpn",), ("roi",), LEAN_PARTS])
@pytest.mark.parametrize("objects", [3, 0])
def test_a_training_step_is_the_same(tmp_path, parts, objects):
    inputs = images(objects)
    losses, gradients, _ = step(detector(tmp_path), inputs)
    lean_losses, lean_gradients, _ = step(detector(tmp_path, parts=parts), inputs)
    for name, loss in losses.items():
        assert torch.equal(lean_losses[name], loss), name
    assert distance(lean_gradients, gradients) < (1e-4 if "rpn" in parts else 1e-9)


def test_under_autocast_the_losses_are_the_same_and_gradients_as_near_to_float32(tmp_path):
    inputs = images()
    _, truth, _ = step(detector(tmp_path), inputs)
    losses, gradients, _ = step(detector(tmp_path), inputs, "bf16")
    lean_losses, lean_gradients, _ = step(detector(tmp_path, parts=LEAN_PARTS), inputs, "bf16")
    assert lean_losses == losses
    assert distance(lean_gradients, truth) < 1.1 * distance(gradients, truth)


def test_bytes_saved_at_a_fixed_size(tmp_path):
    inputs = batch((128, 128), objects=10)
    inputs[0]["instances"].gt_masks = BitMasks(torch.ones(10, 128, 128, dtype=torch.bool))
    opts = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32)
    saved = {
        parts: step(detector(tmp_path, *opts, parts=parts), inputs, "bf16")[2]
        for parts in ((), ("pyramid",), ("rpn",), ("roi",), LEAN_PARTS)
    }
    bounds = {("pyramid",): 0.9, ("rpn",): 0.93, ("roi",): 0.63, LEAN_PARTS: 0.4}
    for parts, bound in bounds.items():
        assert saved[parts] < bound * saved[()], parts


@pytest.mark.parametrize("norm", ["", "LN", "GN", "FrozenBN"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("kind", [FastRCNNConvFCHead, MaskRCNNConvUpsampleHead])
def test_heads(kind, count, precision, norm):
    shape = ShapeSpec(channels=32, height=4, width=4)
    arguments = {"conv_dims": [32] * 3, "conv_norm": norm}
    arguments |= {"fc_dims": [8, 8]} if kind is FastRCNNConvFCHead else {"num_classes": 2}
    torch.manual_seed(0)
    stock = kind(shape, **arguments)
    ours = lean.lean_version(copy.deepcopy(stock))
    results = []
    for head in (stock, ours):
        x = torch.linspace(-1, 1, count * 512).view(count, 32, 4, 4).requires_grad_()
        with (
            count_saved_bytes(head.parameters()) as saved,
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            out = (head.layers if kind is MaskRCNNConvUpsampleHead else head)(x)
        out.float().square().sum().backward()
        results.append((out, [x.grad, *(p.grad for p in head.parameters())], saved.total))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    if count and norm == "LN":
        assert results[1][2] < 0.35 * results[0][2]


def test_small_images_train_on_the_dense_rpn(tmp_path, monkeypatch):
    monkeypatch.setattr(lean, "predictions_at", None)
    opts = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 64)
    results = [step(detector(tmp_path, *opts, parts=parts), images()) for parts in ((), ["rpn"])]
    assert results[0][0] == results[1][0]


@pytest.mark.parametrize("frozen", ["proposal_generator", "roi_heads", "backbone"])
def test_frozen_parts(tmp_path, frozen):
    inputs, results = images(), []
    for parts in ((), LEAN_PARTS):
        model = detector(tmp_path, parts=parts)
        model.get_submodule(frozen).requires_grad_(False)
        results.append(step(model, inputs))
    assert results[0][0] == results[1][0]
    assert distance(results[1][1], results[0][1]) < 1e-4


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "option", ["static_graph", "find_unused_parameters", "gradient_as_bucket_view"]
)
def test_data_parallel_training(tmp_path, one_process, option):
    inputs = images()
    losses, gradients, _ = step(detector(tmp_path), inputs)
    model = DistributedDataParallel(detector(tmp_path, parts=LEAN_PARTS), **{option: True})
    for _ in range(2):
        model.zero_grad()
        lean_losses, lean_gradients, _ = step(model, inputs)
    assert lean_losses == losses
    lean_gradients = {name.removeprefix("module."): g for name, g in lean_gradients.items()}
    assert distance(lean_gradients, gradients) < 1e-4


def test_inference_and_loading_are_untouched(tmp_path):
    stock, ours = detector(tmp_path), detector(tmp_path, parts=LEAN_PARTS)
    assert list(stock.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert isinstance(ours.proposal_generator, lean.LeanRPN)
    found = []
    for model in (stock, ours):
        with torch.no_grad():
            found.append(model.eval()(batch((50, 61)))[0]["instances"])
    assert torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
    assert torch.equal(found[0].pred_masks, found[1].pred_masks)


def test_every_head_of_a_cascade(tmp_path):
    inputs = images()
    stock = detector(tmp_path, *CASCADE)
    ours = detector(tmp_path, *CASCADE, parts=["roi"])
    assert {type(head) for head in ours.roi_heads.box_head} == {lean.LeanBoxHead}
    (losses, gradients, _), (lean_losses, lean_gradients, _) = (
        step(stock, inputs),
        step(ours, inputs),
    )
    assert lean_losses == losses
    assert distance(lean_gradients, gradients) < 1e-9


class OtherHead(Replacement, FastRCNNConvFCHead):
    pass


def test_what_is_changed_and_what_is_not_is_logged(tmp_path, caplog):
    logging.getLogger("dr2net_d2").propagate = True
    model = detector(tmp_path)
    model.roi_heads.box_head = OtherHead(model.roi_heads.box_head)
    model.roi_heads.mask_head[0].norm = nn.BatchNorm2d(16)
    with caplog.at_level(logging.INFO):
        assert make_lean(model, ["rpn", "roi"]) is model
    assert "lean: proposal_generator (LeanRPN)" in caplog.text
    assert "of another kind: roi_heads.box_head (OtherHead), roi_heads.mask_head" in caplog.text
    assert type(model.roi_heads.box_head) is OtherHead
    assert not model.backbone.lean


def test_a_replacement_continues_the_module_under_all_of_its_names():
    head = FastRCNNConvFCHead(ShapeSpec(channels=2, height=1, width=1), conv_dims=[], fc_dims=[2])
    model = nn.ModuleDict({"heads": nn.ModuleList([head]), "other": nn.Identity(), "same": head})
    model.eval()
    calls = []
    head.register_forward_hook(lambda module, *_: calls.append(module))
    names, parameters = list(model.state_dict()), list(model.parameters())
    before = torch.get_rng_state()
    replace_modules(model, {head: OtherHead(head)})
    assert torch.equal(torch.get_rng_state(), before)
    assert list(model) == ["heads", "other", "same"] and list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model["heads"][0] is model["same"] and type(model["same"]) is OtherHead
    assert not model["same"].training
    model["same"](torch.ones(1, 2, 1, 1))
    assert calls == [model["same"]]


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['heads'\]; use some of \['pyramid', 'rpn', 'roi'\]"):
        detector(tmp_path, parts=["heads"])


def test_hooks_of_layers_are_called_once_and_of_heads_always(tmp_path):
    model = detector(tmp_path, parts=LEAN_PARTS)
    calls = []
    for name in ("roi_heads.box_head.conv1", "roi_heads.mask_head.deconv", "roi_heads.box_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    step(model, images())
    assert len(calls) == 3


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_matching_in_chunks_is_detectron2s(monkeypatch, count, low_quality):
    monkeypatch.setattr(lean, "MATCHED_AT_ONCE", 97)
    torch.manual_seed(0)
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=low_quality)
    corners = torch.rand(300 + count, 2) * 50
    boxes = torch.cat([corners, corners + 1 + torch.rand_like(corners) * 30], dim=1).round()
    objects, anchors = Boxes(boxes[:count]), Boxes(boxes[count:])
    matches, labels = lean._match(matcher, objects, anchors)
    expected = matcher(pairwise_iou(objects, anchors))
    assert torch.equal(matches, expected[0])
    assert torch.equal(labels, expected[1])
    assert labels.dtype == expected[1].dtype


def test_a_step_that_matches_in_chunks_is_the_same(tmp_path, monkeypatch):
    inputs = images()
    losses, *_ = step(detector(tmp_path), inputs)
    monkeypatch.setattr(lean, "MATCHED_AT_ONCE", 100)
    lean_losses, *_ = step(detector(tmp_path, parts=["rpn"]), inputs)
    assert lean_losses == losses


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("build_dr2net_vitdet_backbone", (True, lean.LeanRPN)),
        ("build_vitdet_backbone", (None, RPN)),
    ],
)
def test_the_engine_leaves_stock_detectors_stock(tmp_path, name, types):
    model = YamlExperiment(arguments(tmp_path, "MODEL.BACKBONE.NAME", name)).model
    assert (getattr(model.backbone, "lean", None), type(model.proposal_generator)) == types


@pytest.mark.parametrize(
    "check",
    [
        YamlExperiment,
        lambda args: build_model(load_config(args.config_file, args.opts, "detectron2")),
    ],
)
def test_an_unknown_part_in_the_config_is_a_config_error(tmp_path, check):
    with pytest.raises(ConfigError, match=r"LEAN is \['rpn', 'heads'\]; it must be a list of"):
        check(arguments(tmp_path, "MODEL.DR2NET.LEAN", "['rpn', 'heads']"))
