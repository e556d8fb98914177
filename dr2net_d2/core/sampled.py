"""Predictions of a dense convolutional head at a few positions, and matching in chunks.

A region proposal network predicts at every position of every level, but its loss samples a few
hundred anchors. Gradients reach only the positions that these depend on: after r convolutions of
3 x 3, patches of (2 r + 1) x (2 r + 1) positions. To keep and differentiate only these patches is
exact; it keeps megabytes instead of all activations, and saves the dense backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dr2net_d2.core.lean_chain import autocast_without_cache, in_autocast_dtype


def is_sparse(maps: Sequence[Tensor], samples: int, radius: int) -> bool:
    """Whether the squares around the samples of an image hold less than its maps do.

    Args:
        maps: (N, C, H, W), one per level.
        samples: number of samples in an image.
        radius: of a square, whose side is 2 radius + 1.
    """
    return samples * (2 * radius + 1) ** 2 < sum(x.shape[2] * x.shape[3] for x in maps)


def predictions_at(
    hidden: Sequence[nn.Conv2d],
    outputs: Sequence[nn.Conv2d],
    maps: Sequence[Tensor],
    image: Tensor,
    anchor: Tensor,
) -> list[Tensor]:
    """Predictions of the dense head of a region proposal network for some anchors, differentiable.

    Args:
        hidden: 3 x 3 convolutions of stride 1 and zero padding 1, each followed by a ReLU.
        outputs: 1 x 1 convolutions that all read the last hidden layer; the first has one channel
            for each kind of anchor, the others several, with the kinds outermost.
        maps: inputs (N, C, H, W), one per level.
        image, anchor: (S,), indices; anchors are numbered in the order level, row, column, kind.

    Returns:
        For each output (S, channels per kind): the values of the dense head, up to the rounding of
        convolutions of other shapes.
    """
    kinds = outputs[0].out_channels
    x, inside = patches_at(maps, image, anchor // kinds, radius=len(hidden))
    x = in_autocast_dtype(x)
    with autocast_without_cache(x.device):
        for layer in hidden:
            # Beyond the map the next layer must see padding, not the output of this one.
            inside = inside[..., 1:-1, 1:-1]
            x = torch.where(inside, F.relu(F.conv2d(x, layer.weight, layer.bias)), 0)
        values = [layer(x).flatten(1) for layer in outputs]
    each = torch.arange(len(anchor), device=anchor.device)
    return [value.unflatten(1, (kinds, -1))[each, anchor % kinds] for value in values]


def patches_at(
    maps: Sequence[Tensor], image: Tensor, cell: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Squares around cells of several maps, zero beyond the borders.

    Every square is looked up in every map, so that no size depends on values.

    Args:
        maps: (N, C, H, W), one per level.
        image, cell: (S,), indices; cells are numbered in the order level, row, column.

    Returns:
        The patches (S, C, side, side) with side = 2 radius + 1, and a mask (S, 1, side, side) of
        the positions that lie in the map.
    """
    steps = torch.arange(-radius, radius + 1, device=cell.device)
    first = 0
    patches: Tensor | None = None
    inside = torch.zeros((), dtype=torch.bool, device=cell.device)
    for x in maps:
        height, width = x.shape[-2:]
        here = (cell >= first) & (cell < first + height * width)
        # The remainder spreads the cells of other maps: equal indices are slow to differentiate.
        own = (cell - first) % (height * width)
        rows = (own // width)[:, None, None] + steps[:, None]
        columns = (own % width)[:, None, None] + steps
        valid = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        valid = valid & here[:, None, None]
        taken = x.permute(0, 2, 3, 1)[
            image[:, None, None], rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        ]
        patches = torch.where(valid[..., None], taken, 0 if patches is None else patches)
        inside = inside | valid
        first += height * width
    assert patches is not None
    return patches.permute(0, 3, 1, 2), inside[:, None]


def with_gradient_of(values: Tensor, differentiable: Tensor) -> Tensor:
    """``values`` bit for bit; their gradient goes to ``differentiable``, of the same shape."""
    return values.detach() + (differentiable - differentiable.detach())


MATCHED_AT_ONCE = 2**24
"""Overlaps that are computed at once: 64 MB in float32, and temporaries of a few times that."""


def best_matches(
    overlap: Callable[[Tensor, Tensor], Tensor], objects: Tensor, candidates: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Best object of every candidate, and the best candidates of every object, in chunks.

    A chunk is compared only with the objects that touch the box around it. Where candidates are in
    the order of an image's rows, these are a few of the thousands of objects in a crowded scene.

    Args:
        overlap: (o, 4) objects, (n, 4) candidates -> (o, n), at least 0, and 0 for boxes that do
            not touch; called twice with each chunk.
        objects: (O, 4) XYXY, O at least 1.
        candidates: (N, 4) XYXY, N at least 1.
        chunk: number of candidates at a time.

    Returns:
        For each candidate (N,): the overlap with its best object, the index of that object, and
        whether the candidate is the best one of some object, ties included.
    """
    chunks = [(boxes, _touching(objects, boxes)) for boxes in candidates.split(chunk)]
    highest = objects.new_zeros(len(objects))
    best, indices, is_best = [], [], []
    for boxes, near in chunks:
        values, index = boxes.new_zeros(len(boxes)), near.new_zeros(len(boxes))
        if len(near):
            matrix = overlap(objects[near], boxes)
            highest[near] = torch.maximum(highest[near], matrix.amax(dim=1))
            values, index = matrix.max(dim=0)
            index = torch.where(values > 0, near[index], 0)
        best.append(values)
        indices.append(index)
    # For an object that no candidate touches, all are equally good.
    untouched = (highest == 0).any()
    for boxes, near in chunks:
        matrix = overlap(objects[near], boxes)
        is_best.append(untouched | (matrix == highest[near, None]).any(dim=0))
    return torch.cat(best), torch.cat(indices), torch.cat(is_best)


def _touching(objects: Tensor, candidates: Tensor) -> Tensor:
    """Indices of the objects that touch the box around all candidates."""
    low, high = candidates[:, :2].amin(dim=0), candidates[:, 2:].amax(dim=0)
    touching = (objects[:, :2] < high).all(dim=1) & (objects[:, 2:] > low).all(dim=1)
    return touching.nonzero()[:, 0]
