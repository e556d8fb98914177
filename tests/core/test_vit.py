"""The ViT against timm's, and its memory in bytes."""

import pytest
import timm
import torch
from torch import nn

from dr2net_d2.core import Dr2NetViT, SimpleFeaturePyramid
from dr2net_d2.core.attention import window_partition, window_unpartition
from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.weights.plain_vit import convert_vit_checkpoint
from tests.core.stacks import relative_error, tokens

SMALL = {
    "img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4,
    "pretrain_img_size": 32,
}  # fmt: skip


def small_vit(seed=0, **options):
    torch.manual_seed(seed)
    vit = Dr2NetViT(**{**SMALL, **options})
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def features(vit, x, seed=5):
    torch.manual_seed(seed)
    return vit(x)["last_feat"]


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("grad", [True, False])
def test_at_1_0_it_is_timms_plain_vit(arithmetic, grad):
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=4, class_token=False,
        global_pool="", final_norm=False, norm_layer=nn.LayerNorm, num_classes=0,
    )  # fmt: skip
    ours = Dr2NetViT(
        **{**SMALL, "pretrain_img_size": 64}, pretrain_use_cls_token=False, arithmetic=arithmetic
    )
    converted, report = convert_vit_checkpoint(theirs.state_dict(), ours)
    assert not report.problems()
    ours.load_state_dict(converted)
    x = tokens(2, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        expected = theirs.forward_features(x).transpose(1, 2).reshape(2, 32, 8, 8)
        found = features(ours, x)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (3, 4)])
def test_windows_round_trip(size):
    x = tokens(2, *size, 5)
    windows = window_partition(x, 4)
    assert windows.shape[1:] == (4, 4, 5)
    assert torch.equal(windows[0, :3, :4], x[0, :3, :4])
    assert torch.equal(window_unpartition(windows, size), x)


def test_reversible_equals_plain_autograd_with_windows_positions_and_drop_path():
    vit = small_vit(
        use_rel_pos=True, window_size=3, window_block_indexes=[0, 2], drop_path_rate=0.4
    )
    vit.coefficients.set(0.625, 0.375)
    x = tokens(2, 3, 64, 48)

    def gradients():
        vit.zero_grad()
        out = features(vit, x)
        out.square().sum().backward()
        return out, {n: p.grad.clone() for n, p in vit.named_parameters()}

    out, found = gradients()
    vit.reversible = False
    oracle, reference = gradients()
    assert torch.equal(out, oracle)
    # The position embedding is among them (it got none in a published reversible ViT).
    assert relative_error(found, reference) < 1e-6
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    # In evaluation after training: no drop path, and the current coefficients.
    vit.reversible = True
    vit.eval()
    with torch.no_grad():
        first, second = features(vit, x, seed=5), features(vit, x, seed=6)
    assert torch.equal(first, second)
    torch.testing.assert_close(features(vit, x), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (128, 40)])
def test_any_image_size(size):
    vit = small_vit(use_rel_pos=True, window_size=3, window_block_indexes=[0])
    assert features(vit, tokens(1, 3, *size)).shape == (1, 32, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 4}, ["img_size 4", "patch_size 8"]),
        ({"patch_size": 0}, ["patch_size 0"]),
        ({"num_heads": 0}, ["num_heads 0"]),
        ({"num_heads": 5}, ["embed_dim 32", "num_heads 5"]),
        ({"residual_block_indexes": [1]}, ["residual_block_indexes [1]", "leave it empty"]),
        ({"window_block_indexes": [1]}, ["window_size", "is 0"]),
        ({"window_block_indexes": [4], "window_size": 3}, ["[4]", "depth 4"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, words):
    with pytest.raises(ValueError) as error:
        Dr2NetViT(**{**SMALL, **options})
    assert all(word in str(error.value) for word in words)


def test_an_image_that_does_not_divide_is_refused_not_cropped():
    with pytest.raises(ValueError, match=r"68 x 64 px .* multiple of 8"):
        small_vit()(tokens(1, 3, 68, 64))


def saved_bytes(depth, beta, reversible=True, batch=1):
    vit = small_vit(depth=depth, use_rel_pos=True, window_size=4, window_block_indexes=[0])
    vit.blocks.reversible = reversible
    vit.coefficients.set(1 - beta, beta)
    x = tokens(batch, 8, 8, 32).requires_grad_()
    with count_saved_bytes(exclude=tuple(vit.parameters())) as saved:
        vit.blocks(x)
    # A checksum per state and the exponent, whatever the size of the tokens.
    checks = 4 * (2 * depth + 2) + 8 if reversible else 0
    return saved.total - checks, x.nbytes


@pytest.mark.parametrize(("beta", "bits"), [(1 / 2, 1), (3 / 8, 3), (1.0, 0)])
def test_streams_do_not_grow_with_depth(beta, bits):
    for depth in (1, 6, 12):
        total, stream = saved_bytes(depth, beta)
        remainder_bits = 8 * (total - 2 * stream) / (stream / 4)
        assert 0 <= remainder_bits <= bits * 2 * depth * 1.01


@pytest.mark.parametrize("depth", [12, 24])
@pytest.mark.parametrize("beta", [1 / 2, 1.0])
def test_saved_bytes_against_plain_autograd(depth, beta):
    ours, _ = saved_bytes(depth, beta)
    plain, _ = saved_bytes(depth, beta, reversible=False)
    assert ours <= 0.06 * plain


def test_at_beta_0_one_state_a_step_is_kept():
    total, stream = saved_bytes(12, 0.0)
    # 24 steps, of which the first two keep the same tensor, and the two final streams.
    assert total <= 25 * stream


def test_pyramid_levels_and_strides():
    pyramid = SimpleFeaturePyramid(small_vit(), out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5))
    maps = pyramid(tokens(1, 3, 64, 96))
    assert pyramid.strides == {"p1": 2, "p2": 4, "p3": 8, "p4": 16, "p5": 32}
    assert pyramid.size_divisibility == 16
    for name, feature in maps.items():
        stride = pyramid.strides[name]
        assert feature.shape == (1, 16, 64 // stride, 96 // stride)
    assert torch.equal(maps["p5"], maps["p4"][..., ::2, ::2])


@pytest.mark.parametrize(("scales", "patch", "word"), [([3.0], 8, "3.0"), ([4.0], 12, "12")])
def test_pyramid_scales_that_do_not_fit_are_named(scales, patch, word):
    with pytest.raises(ValueError, match=word):
        SimpleFeaturePyramid(small_vit(patch_size=patch), scale_factors=scales)
