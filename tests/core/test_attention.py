"""Attention with relative positions: every way to compute it against the written-out formula."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dr2net_d2.core import attention_kernels
from dr2net_d2.core.attention import Attention
from dr2net_d2.core.attention_kernels import KERNELS, choose_kernel, planned_for
from tests.core.stacks import tokens

CHUNKS = {
    "one row at a time": 1,
    "two rows of a head": 2 * 5 * 35 * 8,
    "two heads of an image": 2 * 35 * 35 * 8,
    "two images": 2 * 3 * 35 * 35 * 8,
    "all at once": 2**30,
}
"""Bytes for 3 images, 3 heads and 7 x 5 tokens in float64."""


def inputs(shape, dim=4, dtype=torch.float64):
    b, heads, h, w = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, w, 3, heads, dim), (h, h, dim), (w, w, dim)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def differentiated(kernel, tensors):
    out = KERNELS[kernel](*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_against_the_written_out_formula(kernel):
    torch.manual_seed(0)
    attention = Attention(12, 3, use_rel_pos=True, rel_pos_zero_init=False, input_size=(4, 3))
    attention.kernel = kernel
    x = tokens(2, 4, 3, 12)
    out = attention(x)
    q, k, v = attention.qkv(x).detach().split(12, dim=-1)
    mixed = torch.zeros(2, 4, 3, 12)
    for image in range(2):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            for row in range(4):
                for column in range(3):
                    query = q[image, row, column, part]
                    logits = torch.stack([
                        query @ k[image, r, c, part] / 2
                        + query @ attention.rel_pos_h[row - r + 3]
                        + query @ attention.rel_pos_w[column - c + 2]
                        for r in range(4) for c in range(3)
                    ])  # fmt: skip
                    value = logits.softmax(0) @ v[image, :, :, part].reshape(12, 4)
                    mixed[image, row, column, part] = value.detach()
    torch.testing.assert_close(out, attention.proj(mixed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_any_size_give_value_and_gradient_of_the_formula(chunk, monkeypatch):
    monkeypatch.setattr(attention_kernels, "CHUNK_BYTES", chunk)
    tensors = inputs((3, 3, 7, 5))
    for found, expected in zip(
        differentiated("chunked", tensors), differentiated("matrix", tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["fused", "chunked"])
@pytest.mark.parametrize("shape", [(1, 2, 24, 24), (6, 2, 14, 14), (2, 1, 9, 40), (1, 3, 1, 1)])
def test_exact_to_1e_5_in_float32(kernel, shape):
    tensors = inputs(shape, dim=16, dtype=torch.float32)
    for found, expected in zip(
        differentiated(kernel, tensors), differentiated("matrix", tensors), strict=True
    ):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(attention_kernels, "CHUNK_BYTES", 2 * 2 * 6 * 8)
    assert torch.autograd.gradcheck(KERNELS["chunked"], inputs((2, 2, 3, 2), dim=2))


@pytest.mark.parametrize("kernel", ["fused", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_further_from_float64_than_the_formula(kernel, dtype, monkeypatch):
    monkeypatch.setattr(attention_kernels, "CHUNK_BYTES", 3 * 16 * 256 * 4)
    tensors = inputs((2, 2, 16, 16), dim=32)
    exact = differentiated("matrix", tensors)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    for found, formula, truth in zip(
        differentiated(kernel, low), differentiated("matrix", low), exact, strict=True
    ):
        assert found.dtype == dtype
        error, allowed = (found - truth).norm(), (formula - truth).norm()
        assert error <= 1.5 * allowed


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast(kernel):
    torch.manual_seed(0)
    attention = Attention(32, 2, use_rel_pos=True, rel_pos_zero_init=False, input_size=(6, 6))
    attention.kernel = kernel
    x = tokens(1, 6, 6, 32).requires_grad_()
    expected = attention(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() <= 0.02 * expected.norm()
    assert all(p.grad.dtype == torch.float32 for p in attention.parameters())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation gave back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return out


def test_detectron2_attention_keeps_n_by_n_logits_and_ours_never_has_them(monkeypatch):
    """The defect of ViTDet: one (heads, N, N) matrix in every global block."""
    monkeypatch.setattr(attention_kernels, "CHUNK_BYTES", 2**18)
    attention = Attention(16, 2, use_rel_pos=True, input_size=(24, 24))
    x = tokens(1, 24, 24, 16).requires_grad_()
    for device in ("cpu", "cuda"):
        with planned_for(device), LargestTensor() as seen:
            attention(x).sum().backward()
        # q and k carry 8 + 24 + 24 channels a head in one kernel, 2^16 logits in the other.
        assert seen.numel <= 576 * 2 * 3 * (8 + 24 + 24) < 2 * 576 * 576


def test_kernels_are_chosen_by_device_and_width():
    fits, too_wide = (torch.empty(1, side, side, 3, 1, 64) for side in (96, 97))
    assert choose_kernel(fits) == "chunked"
    with planned_for("cuda"):
        assert choose_kernel(fits) == "fused"
        assert choose_kernel(too_wide) == "chunked"
    assert choose_kernel(fits) == "chunked"
