import itertools
import math

import pytest
import torch
from torchvision.models.detection.rpn import RegionProposalNetwork

from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.core.pyramid import ChannelLayerNorm
from dr2net_d2.errors import ConfigError
from dr2net_d2.training.optimizer import layer_decay_factor
from dr2net_d2.tv.model import AlignedRoIPool, ExactAnchors, build_model
from dr2net_d2.weights.checkpointer import find_vit


@pytest.fixture
def build(tiny_cfg):
    def build_with(*opts):
        torch.manual_seed(0)
        return build_model(tiny_cfg(*opts))

    return build_with


def one_target():
    return [{"boxes": torch.tensor([[8.0, 8, 24, 28]]), "labels": torch.tensor([3])}]


def test_every_parameter_learns(build):
    model = build("MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.NORM", "LN").train()
    model.backbone.net.coefficients.set(0.5, 0.5)
    losses = model([torch.rand(3, 64, 48) * 255], one_target())
    assert losses.keys() == {
        "loss_classifier",
        "loss_box_reg",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("lean", ["[]", "['pyramid', 'rpn', 'roi']"])
def test_a_level_of_stride_2_learns_and_finds(build, lean):
    model = build(
        *("MODEL.VIT.PATCH_SIZE", "16", "MODEL.VIT.SCALE_FACTORS", "[8.0, 4.0, 2.0]"),
        *("MODEL.RPN.IN_FEATURES", "['p1', 'p2', 'p3', 'p4']", "MODEL.DR2NET.LEAN", lean),
        *("MODEL.ROI_HEADS.IN_FEATURES", "['p1', 'p2', 'p3']"),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[6], [12], [24], [48]]"),
    )
    assert model.backbone.strides == {"p1": 2, "p2": 4, "p3": 8, "p4": 16}
    image = torch.rand(3, 64, 48) * 255
    sum(model.train()([image], one_target()).values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "simfp_1" in name}
    assert len(gradients) == 16
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    with torch.no_grad():
        assert len(model.eval()([image])[0]["boxes"])


def test_an_image_without_objects_trains(build):
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    losses = build().train()([torch.rand(3, 64, 64) * 255], empty)
    assert all(loss.isfinite() for loss in losses.values())


ROI_LAYERS = (
    *("MODEL.VIT.DROP_PATH_RATE", "0.0", "MODEL.RPN.CONV_DIMS", "[-1, -1]"),
    # Few for maps of 336 positions, so that the RPN is sparse.
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "8"),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", "3", "MODEL.ROI_BOX_HEAD.NUM_FC", "2"),
)
TWO_IMAGES = [
    {"boxes": torch.tensor([[8.0, 8, 24, 28], [30, 4, 60, 44]]), "labels": torch.tensor([3, 5])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def training_step(model, precision):
    """Losses, gradients and bytes saved for the backward."""
    images = [torch.linspace(0, 255, 3 * h * w).view(3, h, w) for h, w in ((48, 64), (64, 56))]
    torch.manual_seed(1)
    with (
        count_saved_bytes(model.parameters()) as saved,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        losses = model.train()(images, TWO_IMAGES)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}, saved.total


@pytest.mark.parametrize("norm", ["", "LN"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "parts", ["['pyramid']", "['rpn']", "['roi']", "['pyramid', 'rpn', 'roi']"]
)
def test_a_training_step_with_lean_parts_is_the_same(build, parts, precision, norm):
    opts = (*ROI_LAYERS, "MODEL.ROI_BOX_HEAD.NORM", norm)
    stock, lean = build("MODEL.DR2NET.LEAN", "[]", *opts), build("MODEL.DR2NET.LEAN", parts, *opts)
    assert list(stock.state_dict()) == list(lean.state_dict())
    assert type(stock.rpn) is RegionProposalNetwork
    losses, gradients, saved = training_step(stock, precision)
    lean_losses, lean_gradients, lean_saved = training_step(lean, precision)
    assert lean_losses == losses
    assert lean_saved < saved
    tolerance = {"float32": 1e-4, "bf16": 0.1}[precision] if "rpn" in parts else 0
    for name, gradient in gradients.items():
        assert (lean_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_detections_with_and_without_lean_parts_are_the_same(build):
    images = [torch.linspace(0, 255, 3 * 50 * 70).view(3, 50, 70)]
    found = []
    for parts in ("[]", "['pyramid', 'rpn', 'roi']"):
        with torch.no_grad():
            found.append(build("MODEL.DR2NET.LEAN", parts, *ROI_LAYERS).eval()(images)[0])
    assert torch.equal(found[0]["boxes"], found[1]["boxes"])


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_matching_in_chunks_is_torchvisions(build, monkeypatch, count, low_quality):
    torch.manual_seed(0)
    corners = torch.rand(300 + count, 2) * 50
    boxes = torch.cat([corners, corners + 1 + torch.rand_like(corners) * 30], dim=1).round()
    targets = [{"boxes": boxes[:count]}, {"boxes": boxes[:0]}]
    results = []
    for parts in ("[]", "['rpn']"):
        rpn = build("MODEL.DR2NET.LEAN", parts).rpn
        rpn.proposal_matcher.allow_low_quality_matches = low_quality
        monkeypatch.setattr("dr2net_d2.tv.lean_heads.MATCHED_AT_ONCE", 97)
        results.append(rpn.assign_targets_to_anchors([boxes[count:]] * 2, targets))
    for stock, lean in zip(*map(itertools.chain.from_iterable, results), strict=True):
        assert torch.equal(stock, lean)
        assert stock.dtype == lean.dtype


def test_names_are_where_checkpoints_and_layer_decay_expect_them(build):
    model = build()
    assert find_vit(model) == ("backbone.net", model.backbone.net)
    names = dict(model.named_parameters())
    assert {"backbone.net.pos_embed", "backbone.simfp_2.0.weight"} <= names.keys()
    assert layer_decay_factor("backbone.net.blocks.1.mlp.fc1.weight", 2, 0.5) == 0.5
    assert layer_decay_factor("backbone.simfp_2.0.weight", 2, 0.5) == 1
    assert isinstance(model.backbone.net.blocks[0].norm1, torch.nn.LayerNorm)
    assert model.backbone.net.blocks[0].norm1.eps == 1e-6


def test_the_box_head_has_the_layers_of_the_config(build):
    model = build(
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", "2", "MODEL.ROI_BOX_HEAD.CONV_DIM", "24"),
        *("MODEL.ROI_BOX_HEAD.NORM", "LN", "MODEL.ROI_BOX_HEAD.NUM_FC", "3"),
        *("MODEL.RPN.CONV_DIMS", "[-1, -1]"),
    )
    shapes = [tuple(p.shape) for p in model.roi_heads.box_head.parameters() if p.dim() > 1]
    assert shapes == [(24, 16, 3, 3), (24, 24, 3, 3), (16, 24 * 4 * 4), (16, 16), (16, 16)]
    norms = [m for m in model.roi_heads.box_head.modules() if isinstance(m, ChannelLayerNorm)]
    assert len(norms) == 2
    assert len(model.rpn.head.conv) == 2
    assert model.roi_heads.box_predictor.cls_score.out_features == 11


def test_detections_obey_the_config(build):
    model = build("TEST.DETECTIONS_PER_IMAGE", "7").eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 50, 100) * 255])
    assert len(found["scores"]) == 7
    assert found["labels"].min() >= 1
    assert found["labels"].max() <= 10
    # In px of the image as given, although the model has seen it as 32 x 64.
    assert (found["boxes"] <= torch.tensor([100.0, 50, 100, 50])).all()
    assert found["boxes"][:, 2].max() > 64
    model = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99").eval()
    with torch.no_grad():
        assert len(model([torch.rand(3, 64, 64) * 255])[0]["scores"]) == 0


def test_images_are_normalised_in_pixel_units_and_padded(build):
    transform = build().transform.eval()
    image = torch.full((3, 40, 64), 191.5)
    images, _ = transform([image])
    # 40 x 64 fits already; the coarsest level has stride 16.
    assert images.image_sizes == [(40, 64)]
    assert images.tensors.shape == (1, 3, 48, 64)
    assert (images.tensors[:, :, :40] == 1).all()
    assert (images.tensors[:, :, 40:] == 0).all()
    images, _ = build("MODEL.VIT.SQUARE_PAD", "96").transform.eval()([image])
    assert images.tensors.shape == (1, 3, 96, 96)


def test_training_images_are_not_resized_again(build):
    images, _ = build().transform.train()([torch.zeros(3, 30, 30)])
    assert images.image_sizes == [(30, 30)]


def test_anchors_are_exact():
    boxes = ExactAnchors(((10.0,),), ((0.6, 1.0),)).cell_anchors[0]
    width, height = 10 / math.sqrt(0.6), 10 * math.sqrt(0.6)
    expected = [[-width, -height, width, height], [-10, -10, 10, 10]]
    torch.testing.assert_close(boxes, torch.tensor(expected) / 2)


def test_pooling_reads_pixel_centres():
    """On a ramp, bilinear samples are exact: each bin holds the position of its centre."""
    pool = AlignedRoIPool({"p2": 4, "p3": 8}, resolution=2, sampling_ratio=2)
    # A feature pixel of stride s has its centre at s * (i + 1/2) in the image.
    ramps = {
        name: ((torch.arange(256 // s) + 0.5) * s).expand(1, 1, 256 // s, -1)
        for name, s in (("p2", 4), ("p3", 8))
    }
    boxes = torch.tensor([[20.0, 20, 60, 60], [60, 60, 188, 188]])
    pooled = pool(ramps, [boxes], [(256, 256)])
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[30.0, 50], [30, 50]]))
    torch.testing.assert_close(pooled[1, 0], torch.tensor([[92.0, 156], [92, 156]]))


@pytest.mark.parametrize("finest", [1, 2])
def test_pooling_equals_detectron2s(finest):
    pytest.importorskip("detectron2")
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    torch.manual_seed(0)
    features = [torch.rand(2, 5, 64 // s, 64 // s) for s in (1, 2, 4)]
    corners = torch.rand(2, 40, 2) * 150
    boxes = torch.cat([corners, corners + torch.rand(2, 40, 2) ** 3 * 400], dim=2)
    strides = {f"p{level}": 2**level for level in range(finest, finest + 3)}
    theirs = ROIPooler(3, [1 / stride for stride in strides.values()], 0, "ROIAlignV2")
    ours = AlignedRoIPool(strides, 3, 0)
    expected = theirs(features, [Boxes(b) for b in boxes])
    pooled = ours(dict(zip(strides, features, strict=True)), list(boxes), [])
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("MODEL.VIT.NUM_HEADS", "3", "embed_dim 32"),
        ("MODEL.VIT.SCALE_FACTORS", "[16.0]", "MODEL.VIT.SCALE_FACTORS is [16.0]"),
        ("MODEL.VIT.SCALE_FACTORS", "[0.25]", "each 8.0, 4.0, 2.0, 1.0 or 0.5"),
        ("MODEL.DR2NET.ARITHMETIC", "integer", "MODEL.DR2NET.ARITHMETIC is 'integer'"),
        ("MODEL.DR2NET.LEAN", "['heads']", "MODEL.DR2NET.LEAN is ['heads']; it must be a list"),
        ("MODEL.RPN.IN_FEATURES", "['p2', 'p3']", "MODEL.RPN.IN_FEATURES"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p4']", "MODEL.ROI_HEADS.IN_FEATURES"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[10], [20]]", "MODEL.ANCHOR_GENERATOR.SIZES"),
        ("MODEL.VIT.SQUARE_PAD", "72", "multiple of 16"),
    ],
)
def test_what_does_not_fit_together_is_refused(build, key, value, named):
    with pytest.raises(ConfigError) as caught:
        build(key, value)
    assert named in str(caught.value)
