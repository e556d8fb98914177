"""Swin and MViTv2 with reversible stages against Detectron2's own, with the same weights."""

from functools import partial

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.mvit import MViT
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dr2net_d2.core import reversible_stacks
from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.d2 import Dr2NetMViT, Dr2NetSwin
from dr2net_d2.plan.simulation import parameters_on_meta
from dr2net_d2.weights.plain_vit import plain_vit_state_dict
from tests.core.stacks import relative_error, tokens

SWIN = {
    "embed_dim": 8, "depths": (2, 1, 3), "num_heads": (1, 2, 4), "window_size": 4,
    "drop_path_rate": 0.0, "out_indices": (0, 1, 2),
}  # fmt: skip
# The last stage consists of the block that pools.
MVIT = {
    "img_size": 64, "embed_dim": 8, "depth": 6, "last_block_indexes": (1, 4, 5),
    "adaptive_window_size": 8, "rel_pos_zero_init": False,
    "out_features": ("scale2", "scale3", "scale4"),
}  # fmt: skip
NETWORKS = {
    "swin": (SwinTransformer, Dr2NetSwin, SWIN),
    "swin_ape": (SwinTransformer, Dr2NetSwin, SWIN | {"ape": True, "pretrain_img_size": 32}),
    "swin_frozen": (SwinTransformer, Dr2NetSwin, SWIN | {"frozen_stages": 2}),
    "swin_drop_path": (SwinTransformer, Dr2NetSwin, SWIN | {"drop_path_rate": 0.5}),
    "mvit": (MViT, Dr2NetMViT, MVIT),
    "mvit_abs_pos": (MViT, Dr2NetMViT, MVIT | {"use_abs_pos": True, "pretrain_img_size": 32}),
    "mvit_drop_path": (MViT, Dr2NetMViT, MVIT | {"drop_path_rate": 0.5}),
}
BOTH = ["swin", "mvit"]


def pair(name, **options):
    """(Detectron2's network, ours) with the same random weights."""
    stock, converted, arguments = NETWORKS[name]
    torch.manual_seed(0)
    theirs = stock(**arguments)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = converted(**arguments, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def set_coefficients(network, alpha, beta):
    for stack in reversible_stacks(network):
        stack.coefficients.set(alpha, beta)


def loss_of(features):
    """A fixed random projection of all features."""
    return sum(
        (feature * tokens(*feature.shape, seed=seed)).sum()
        for seed, feature in enumerate(features.values())
    )


def run(network, images, seed=3):
    """(features, {parameter name: gradient}); "x" is the gradient of the images."""
    torch.manual_seed(seed)
    network.zero_grad()
    images = images.clone().requires_grad_()
    features = network(images)
    loss_of(features).backward()
    named = [(name, p) for name, p in network.named_parameters() if p.grad is not None]
    gradients = {"x": images.grad, **{name: p.grad.clone() for name, p in named}}
    return features, gradients


@pytest.mark.parametrize("name", BOTH)
def test_names_of_parameters_and_the_state_dict_are_detectron2s(name):
    theirs, ours = pair(name)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    own = ours.state_dict().keys() - theirs.state_dict().keys()
    endings = ("coefficients.alpha", "coefficients.beta", "stream_range.peak",
               "stream_range.extra_bits")  # fmt: skip
    assert len(own) == len(endings) * len(reversible_stacks(ours))
    assert all(key.endswith(endings) for key in own)

    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(plain_vit_state_dict(ours), strict=True)
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))


# Windows have 4 or 8 tokens of 4 pixels: (32, 32) consists of whole ones, others need padding.
@pytest.mark.parametrize("size", [(32, 32), (72, 104), (42, 53)])
@pytest.mark.parametrize("name", NETWORKS)
def test_at_1_0_outputs_and_gradients_are_detectron2s(name, size):
    theirs, ours = pair(name)
    images = tokens(2, 3, *size)
    expected, expected_gradients = run(theirs, images)
    actual, gradients = run(ours, images)
    assert list(actual) == list(expected)
    for level, feature in expected.items():
        torch.testing.assert_close(actual[level], feature, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("name", BOTH)
def test_inference_is_detectron2s(name):
    theirs, ours = pair(name)
    images = tokens(1, 3, 72, 104)
    with torch.no_grad():
        for level, feature in theirs(images).items():
            torch.testing.assert_close(ours(images)[level], feature, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("beta", [1 / 16, 1 / 2, 1])
@pytest.mark.parametrize("name", ["swin_drop_path", "mvit_drop_path"])
def test_the_reversible_backward_is_plain_autograds(name, beta, autocast):
    _, ours = pair(name)
    set_coefficients(ours, 1 - beta, beta)
    images = tokens(2, 3, 72, 104)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for reversible in (True, False):
            for stack in reversible_stacks(ours):
                stack.reversible = reversible
            results.append(run(ours, images))
    (features, gradients), (oracle, reference) = results
    assert all(torch.equal(features[level], feature) for level, feature in oracle.items())
    assert relative_error(gradients, reference) < 1e-6


@pytest.mark.parametrize("name", BOTH)
def test_a_later_forward_of_another_size_does_not_disturb_the_backward(name):
    _, ours = pair(name)
    set_coefficients(ours, 0.5, 0.5)
    small, large = tokens(1, 3, 40, 48), tokens(1, 3, 72, 104)
    expected = run(ours, small)[1]
    ours.zero_grad()
    loss = loss_of(ours(small))
    ours(large)
    loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    del expected["x"]
    assert relative_error(gradients, expected) < 1e-6


@pytest.mark.parametrize("name", BOTH)
def test_the_options_reach_every_stage(name):
    options = {"reversible": False, "arithmetic": "float", "first_state": "zero", "output": "mean"}
    stages = reversible_stacks(pair(name, **options)[1])
    assert len(stages) == {"swin": 3, "mvit": 2}[name]
    for stage in stages:
        assert {option: getattr(stage, option) for option in options} == options


def test_checkpoints_inside_are_refused():
    with pytest.raises(ValueError, match="use_checkpoint is True"):
        Dr2NetSwin(**SWIN, use_checkpoint=True)
    with pytest.raises(ValueError, match="use_act_checkpoint is True"):
        Dr2NetMViT(**MVIT, use_act_checkpoint=True)


@pytest.mark.parametrize("name", BOTH)
def test_a_lazy_config_needs_another_target_and_nothing_else(name):
    stock, converted, arguments = NETWORKS[name]
    features = ["p0", "p1"] if name == "swin" else ["scale2", "scale3"]
    node = LazyCall(FPN)(
        bottom_up=LazyCall(stock)(**arguments), in_features=features, out_channels=8
    )
    node.bottom_up._target_ = converted
    pyramid = instantiate(node)
    assert type(pyramid.bottom_up) is converted
    assert list(pyramid(tokens(1, 3, 64, 64))) == ["p2", "p3"]


BASE = {
    "swin": {
        "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32],
        "drop_path_rate": 0.4,
    },
    "mvit": {
        "embed_dim": 96, "depth": 24, "num_heads": 1, "last_block_indexes": (1, 4, 20, 23),
        "drop_path_rate": 0.4, "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    },
}  # fmt: skip
"""Swin-B and MViTv2-B of Detectron2's projects/ViTDet."""


@pytest.mark.parametrize(
    ("name", "autocast", "stock", "checkpointed", "reversible"),
    [
        ("swin", False, 5023, 506, 252),
        ("mvit", False, 5953, 237, 166),
        ("swin", True, 3137, 267, 197),
        # Checkpoints keep streams in half precision: with few blocks, ours gain nothing on them.
        ("mvit", True, 3099, 118, 136),
    ],
)
def test_megabytes_that_a_1024_px_image_keeps_for_the_backward(
    name, autocast, stock, checkpointed, reversible
):
    """In float32 and bf16; ours at beta 1/2, Detectron2's also with a checkpoint per block."""
    found = []
    for arm in ("stock", "checkpointed", "reversible"):
        with parameters_on_meta():
            network = NETWORKS[name][arm == "reversible"](**BASE[name])
        blocks = [m for n, m in network.named_modules() if n.rpartition(".")[0].endswith("blocks")]
        for block in blocks if arm == "checkpointed" else ():
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        set_coefficients(network, 0.5, 0.5)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            network.to_empty(device="cpu")
            with count_saved_bytes(exclude=network.parameters()) as saved:
                network(torch.randn(1, 3, 1024, 1024))
        found.append(saved.total / 1e6)
    assert found == pytest.approx([stock, checkpointed, reversible], rel=0.01)
