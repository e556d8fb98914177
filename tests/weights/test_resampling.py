"""Weights for images and patches of other sizes, against timm and the definition."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import patch_embed

from dr2net_d2.weights.resampling import resize_patches, split_positions


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (16, 8), (8, 32)])
def test_patches_are_resized_as_by_timm(monkeypatch, old, new):
    # timm computes in float32, which is too coarse to compare with.
    resize_matrix = patch_embed._compute_resize_matrix
    monkeypatch.setattr(
        patch_embed,
        "_compute_resize_matrix",
        lambda *args: resize_matrix(*args[:-1], torch.float64),
    )
    kernel = torch.randn(5, 3, old, old)
    expected = patch_embed.resample_patch_embed(kernel, [new, new])
    torch.testing.assert_close(resize_patches(kernel, new), expected, rtol=1e-5, atol=1e-5)


def test_larger_patches_see_in_enlarged_images_what_they_saw():
    kernel, image = torch.randn(5, 3, 14, 14).double(), torch.randn(1, 3, 14, 14).double()
    enlarged = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    expected = F.conv2d(image, kernel)
    torch.testing.assert_close(F.conv2d(enlarged, resize_patches(kernel, 16)), expected)


@pytest.mark.parametrize(
    ("shape", "prefix", "side"),
    [((1, 196, 4), 0, 14), ((1, 197, 4), 1, 14), ((1, 201, 4), 5, 14), ((1, 6, 6, 4), 0, 6)],
)
def test_rows_of_prefix_tokens(shape, prefix, side):
    table = torch.randn(shape)
    rows, grid = split_positions(table, 5)
    assert rows.shape == (1, prefix, 4)
    assert grid.shape == (1, 4, side, side)
    flat = table.flatten(1, -2)
    assert torch.equal(torch.cat([rows, grid.flatten(2).transpose(1, 2)], dim=1), flat)


def test_a_grid_that_is_not_square_is_not_guessed_at():
    assert split_positions(torch.randn(1, 14 * 16, 4), 8) is None
