"""Lean chains, pooling and sampled heads against the same layers under plain autograd."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

from dr2net_d2.core import SimpleFeaturePyramid
from dr2net_d2.core.lean_chain import (
    BareConvolution,
    NormInPieces,
    SharedCast,
    has_inner_hooks,
    in_autocast_dtype,
    lean_chain,
    lean_max_pool,
    regions_of,
)
from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.core.pyramid import ChannelLayerNorm, ConvNorm
from dr2net_d2.core.sampled import (
    best_matches,
    is_sparse,
    patches_at,
    predictions_at,
    with_gradient_of,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def block(width=8):
    return [nn.Conv2d(width, width, 3, padding=1), ChannelLayerNorm(width), nn.ReLU()]


def convolutions(norm=True):
    layers = [layer for _ in range(4) for layer in block()]
    layers = layers if norm else [x for x in layers if not isinstance(x, ChannelLayerNorm)]
    return nn.ModuleList([*layers, nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(inplace=True)])


def outcome(function, layers, x, precision="float32"):
    """Output, gradients of parameters and input, bytes saved."""
    layers.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with count_saved_bytes(layers.parameters()) as saved, autocast(precision):
        out = function(layers, x)
    if out.requires_grad:
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in (*layers.parameters(), x)], saved.total


def plainly(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("products", [1, 2, 3, 99])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_chain_is_its_layers_bit_for_bit(count, products, precision, norm):
    layers, x = convolutions(norm), torch.randn(count, 8, 6, 6).requires_grad_()
    expected = outcome(plainly, layers, x, precision)
    actual = outcome(lambda m, y: lean_chain(list(m), y, products), layers, x, precision)
    assert_same(actual, expected)


def test_regions_end_behind_products_counted_from_the_last():
    layers = convolutions()
    sizes = {n: [len(region) for region in regions_of(list(layers), n)] for n in (1, 2, 3, 99)}
    # conv, then norm relu conv ..., then norm relu flatten linear, then relu
    assert sizes == {1: [1, 3, 3, 3, 4, 1], 2: [1, 6, 7, 1], 3: [4, 10, 1], 99: [14, 1]}


def test_what_a_chain_keeps():
    """x and four convolutions in bf16, and the output of the linear layer."""
    layers, x = convolutions(), torch.randn(16, 8, 6, 6).requires_grad_()
    map_bytes = 2 * x.numel()
    kept = {
        products: outcome(lambda m, y, n=products: lean_chain(list(m), y, n), layers, x, "bf16")[2]
        for products in (1, 2, 99)
    }
    out_bytes = 2 * 16 * 16
    assert kept == {
        1: 5 * map_bytes + out_bytes,
        2: 3 * map_bytes + out_bytes,
        99: map_bytes + out_bytes,
    }
    assert outcome(plainly, layers, x, "bf16")[2] > 12 * map_bytes


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("products", "again"), [(1, 0), (2, 2), (3, 3), (5, 4), (99, 4)])
def test_convolutions_at_the_ends_of_regions_are_computed_once(products, again):
    x = torch.randn(2, 8, 6, 6).requires_grad_()
    with Convolutions() as convolved:
        outcome(lambda m, y: lean_chain(list(m), y, products), convolutions(), x)
    assert convolved.count == 4 + again


@pytest.mark.parametrize("frozen", ["all", "first", "input"])
def test_frozen_parts(frozen):
    layers = convolutions()
    for layer in {"all": layers, "first": layers[:6], "input": ()}[frozen]:
        layer.requires_grad_(False)
    x = torch.randn(2, 8, 6, 6).requires_grad_(frozen == "all")
    assert_same(
        outcome(lambda m, y: lean_chain(list(m), y, 2), layers, x), outcome(plainly, layers, x)
    )


def test_nothing_is_kept_without_gradients():
    layers, x = convolutions(), torch.randn(2, 8, 6, 6)
    with torch.no_grad(), count_saved_bytes() as saved:
        assert torch.equal(lean_chain(list(layers), x), plainly(layers, x))
        assert saved.total == 0
    layers.requires_grad_(False)
    alive = weakref.ref(x)
    out = lean_chain(list(layers), x)
    del x
    assert alive() is None
    assert not out.requires_grad


def test_a_convolution_without_its_norm():
    module, x = ConvNorm(4, 6, 3), torch.randn(1, 4, 5, 5)
    assert torch.equal(module.norm(BareConvolution(module)(x)), module(x))


def test_hooks_of_inner_modules_are_seen():
    network = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))
    network.register_forward_hook(lambda *_: None)
    assert not has_inner_hooks(network)
    network[1][0].register_full_backward_hook(lambda *_: None)
    assert has_inner_hooks(network)


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (1, 2, 5, 7), (0, 2, 4, 4)])
def test_max_pooling_ties_included(shape):
    x = torch.randint(0, 3, shape).float().requires_grad_()
    expected = F.max_pool2d(x, 2, 2)
    gradient = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad(expected, x, gradient)
    with count_saved_bytes() as saved:
        actual = lean_max_pool(x)
    (ours,) = torch.autograd.grad(actual, x, gradient)
    assert torch.equal(actual, expected)
    assert torch.equal(ours, theirs)
    assert saved.total == expected.numel()


def test_max_pooling_is_differentiable():
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lean_max_pool, x)


def test_readers_of_a_shared_cast_add_their_gradients_in_float32():
    x = torch.randn(1, 4, 5, 1).permute(0, 3, 1, 2).requires_grad_()
    gradients = torch.randn(3, *x.shape).bfloat16()
    with autocast("bf16"):
        shared = SharedCast(x)
        reads = [shared.read() for _ in range(3)]
    for read in reads:
        assert torch.equal(read, x.bfloat16())
        assert read.stride() == x.stride()
        assert read.data_ptr() == reads[0].data_ptr()
    torch.autograd.backward(reads, list(gradients))
    assert torch.equal(x.grad, gradients[0].float() + gradients[1] + gradients[2])
    assert SharedCast(x).read() is x


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("activation", [None, nn.GELU()])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("piece", [1, 1200, 10**6])
@pytest.mark.parametrize("frozen", ["", "weight", "x"])
def test_a_norm_in_pieces(monkeypatch, frozen, piece, precision, activation, low):
    monkeypatch.setattr("dr2net_d2.core.lean_chain._PIECE_ELEMENTS", piece)
    # A row is whole vectors: their remainder a CPU may round in another way.
    norm = ChannelLayerNorm(64)
    nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(frozen != "weight")
    x = torch.randn(2, 64, 5, 4).requires_grad_(frozen != "x")

    def plain(_, y):
        y = norm(y)
        y = y if activation is None else activation(y)
        return in_autocast_dtype(y) if low else y

    expected = outcome(plain, norm, x, precision)
    actual = outcome(lambda m, y: NormInPieces(m, activation, low)(y), norm, x, precision)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert actual[2] == x.nbytes


class Map(nn.Module):
    """Stands for a ViT: a float32 map with channels last."""

    patch_size, embed_dim, out_feature = 16, 16, "map"

    def __init__(self, size):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(2, *size, self.embed_dim))

    def forward(self, _):
        return {"map": (self.tokens * 1).permute(0, 3, 1, 2)}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
@pytest.mark.parametrize("finest", [1, 2])
def test_a_lean_pyramid_is_the_pyramid_bit_for_bit(finest, size, precision):
    factors = (8.0, 4.0, 2.0, 1.0, 0.5)[finest - 1 :]
    plain = SimpleFeaturePyramid(Map(size), 32, factors)
    lean = SimpleFeaturePyramid(Map(size), 32, factors, lean=True)
    assert list(plain.state_dict()) == list(lean.state_dict())
    lean.load_state_dict(plain.state_dict())

    def flat(modules, _):
        levels = modules[0](None)
        assert list(levels) == [f"p{level}" for level in range(finest, 7)]
        return torch.cat([level.float().flatten() for level in levels.values()])

    x = torch.zeros(())
    expected = outcome(flat, nn.ModuleList([plain]), x, precision)
    actual = outcome(flat, nn.ModuleList([lean]), x, precision)
    assert_same(actual, expected)
    assert actual[2] < {"float32": 0.31, "bf16": 0.26}[precision] * expected[2]


@pytest.mark.parametrize("lean", [False, True])
def test_a_level_of_stride_2_is_three_doublings(lean):
    pyramid = SimpleFeaturePyramid(Map((3, 4)), 24, (8.0, 4.0, 1.0), lean=lean)
    level = pyramid(None)["p1"]
    assert level.shape == (2, 24, 24, 32)
    assert pyramid.strides == {"p1": 2, "p2": 4, "p4": 16, "p5": 32}
    weights = pyramid.simfp_1.state_dict(keep_vars=True)
    inputs = [pyramid.net.tokens, *weights.values()]

    def norm(x, name):
        x, shape = x.permute(0, 2, 3, 1), weights[f"{name}.weight"].shape
        x = F.layer_norm(x, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
        return x.permute(0, 3, 1, 2)

    def double(x, name):
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    x = pyramid.net(None)["map"]
    x = F.gelu(norm(double(x, "0"), "1"))
    x = double(F.gelu(norm(double(x, "3"), "4")), "6")
    x = norm(F.conv2d(x, weights["7.weight"]), "7.norm")
    expected = norm(F.conv2d(x, weights["8.weight"], padding=1), "8.norm")
    torch.testing.assert_close(level, expected)
    gradient = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(level, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hooks_in_a_lean_pyramid_are_called_once():
    lean = SimpleFeaturePyramid(Map((4, 4)), 8, lean=True)
    calls = []
    lean.simfp_2[1].register_forward_hook(lambda *_: calls.append(1))
    sum(level.sum() for level in lean(None).values()).backward()
    assert calls == [1]


def dense_head(hidden, channels=6, kinds=3):
    layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(hidden)]
    return nn.ModuleList(
        [*layers, nn.Conv2d(channels, kinds, 1), nn.Conv2d(channels, 4 * kinds, 1)]
    )


def dense_predictions(head, maps):
    """Per output: (N, anchors, channels), anchors in the order level, row, column, kind."""
    outputs = ([], [])
    for x in maps:
        for layer in head[:-2]:
            x = F.relu(layer(x))
        for output, layer, channels in zip(outputs, head[-2:], (1, 4), strict=True):
            y = layer(x).unflatten(1, (3, channels))
            output.append(y.permute(0, 3, 4, 1, 2).flatten(1, 3))
    return [torch.cat(output, dim=1) for output in outputs]


@pytest.mark.parametrize("hidden", [0, 1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 150])
def test_sampled_predictions_and_their_gradients_are_those_of_the_dense_head(hidden, count):
    head = dense_head(hidden).double()
    maps = [torch.randn(2, 6, *size).double().requires_grad_() for size in ((7, 9), (3, 4), (1, 2))]
    total = 3 * (63 + 12 + 2)
    image, anchor = torch.randint(0, 2, (count,)), torch.randint(0, total, (count,))
    expected = [output[image, anchor] for output in dense_predictions(head, maps)]
    actual = predictions_at(head[:-2], head[-2:], maps, image, anchor)
    inputs = [*maps, *head.parameters()]
    gradients = [torch.randn_like(output) for output in expected]
    theirs = torch.autograd.grad(expected, inputs, gradients, retain_graph=True)
    ours = torch.autograd.grad(actual, inputs, gradients)
    for a, b in zip([*actual, *ours], [*expected, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_samples_are_sparse_if_their_squares_are_less_than_the_maps():
    maps = [torch.zeros(2, 8, 5, 6), torch.zeros(2, 8, 3, 2)]
    assert is_sparse(maps, samples=3, radius=1)
    assert not is_sparse(maps, samples=4, radius=1)
    assert not is_sparse(maps, samples=2, radius=2)


def test_patches_are_zero_beyond_the_borders():
    maps = [torch.ones(1, 1, 2, 3), 2 * torch.ones(1, 1, 1, 1)]
    patches, inside = patches_at(maps, torch.tensor([0, 0]), torch.tensor([0, 6]), 1)
    assert patches[:, 0].tolist() == [
        [[0, 0, 0], [0, 1, 1], [0, 1, 1]],
        [[0, 0, 0], [0, 2, 0], [0, 0, 0]],
    ]
    assert torch.equal(inside, patches > 0)


def test_values_of_one_with_the_gradient_of_another():
    values, other = torch.tensor([1e30, -3.0]), torch.tensor([7.0, 1e-30]).requires_grad_()
    both = with_gradient_of(values, other)
    both.backward(torch.tensor([2.0, 3.0]))
    assert torch.equal(both.detach(), values)
    assert other.grad.tolist() == [2, 3]


@pytest.mark.parametrize("far", [False, True], ids=["all touched", "one untouched"])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_matches_in_chunks_are_those_of_the_whole_matrix(chunk, far):
    # On a coarse grid, so that there are ties; sorted, so that chunks leave objects out.
    corners = torch.randint(0, 12, (45, 2)).float()
    boxes = torch.cat([corners, corners + torch.randint(1, 4, (45, 2))], dim=1)
    objects, candidates = boxes[:5], boxes[5:][boxes[5:, 1].argsort()]
    if far:
        objects = torch.cat([objects, torch.tensor([[90.0, 90, 99, 99]])])
    matrix = box_iou(objects, candidates)
    compared = 0

    def overlap(some, part):
        nonlocal compared
        compared += len(some) * len(part)
        return box_iou(some, part)

    values, best, is_best = best_matches(overlap, objects, candidates, chunk)
    assert torch.equal(values, matrix.max(dim=0).values)
    assert torch.equal(best, matrix.max(dim=0).indices)
    assert torch.equal(is_best, (matrix == matrix.amax(dim=1, keepdim=True)).any(dim=0))
    assert is_best.all() == far
    assert compared <= 2 * matrix.numel() * (0.7 if chunk < 40 else 1)


def test_a_lean_pyramid_can_be_copied():
    lean = copy.deepcopy(SimpleFeaturePyramid(Map((2, 2)), 8, lean=True))
    assert lean.lean
