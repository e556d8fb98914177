"""Small stacks of residual functions and the comparisons that tests make with them."""

import torch
from torch import nn

from dr2net_d2.core import Coefficients, ReversibleSequence
from dr2net_d2.core.streams import FixedPointStream

BETAS = [m / 16 for m in range(1, 17)]


def mlp(dim=8, hidden=16, dropout=0.0):
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout),
        nn.Linear(hidden, dim),
    )  # fmt: skip


def stack(steps, beta=0.5, dim=8, dropout=0.0, seed=0, **options):
    """A ReversibleSequence of ``steps`` MLPs at alpha = 1 - beta."""
    torch.manual_seed(seed)
    functions = [mlp(dim, 2 * dim, dropout) for _ in range(steps)]
    return ReversibleSequence(functions, Coefficients(1 - beta, beta, grid=None), **options)


def tokens(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(sequence, x, seed=3):
    """(output, {name: gradient}) of a fixed scalar of the output, x's own gradient as "x"."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    sequence.zero_grad()
    out = sequence(x)
    (out * tokens(*out.shape, seed=4, dtype=out.dtype)).sum().backward()
    named = [(name, p) for name, p in sequence.named_parameters() if p.grad is not None]
    return out.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in named}}


def relative_error(gradients, reference):
    """Norm of the difference of two gradient dicts over the norm of the reference."""
    assert gradients.keys() == reference.keys()
    difference = sum(
        (gradients[n].double() - g.double()).square().sum() for n, g in reference.items()
    )
    return (difference / sum(g.double().square().sum() for g in reference.values())).sqrt().item()


def record_states(monkeypatch):
    """Lists that fill with the states going into each step and coming out of each inverse."""
    forward, backward = [], []
    step, inverse = FixedPointStream.step, FixedPointStream.inverse

    def recording_step(self, i, f, state1, state2, *rest):
        forward.append(state2.clone())
        return step(self, i, f, state1, state2, *rest)

    def recording_inverse(self, *args):
        state2 = inverse(self, *args)
        backward.append(state2.clone())
        return state2

    monkeypatch.setattr(FixedPointStream, "step", recording_step)
    monkeypatch.setattr(FixedPointStream, "inverse", recording_inverse)
    return forward, backward
