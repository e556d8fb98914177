"""Values that are not finite, put where and when a test wants them; and a look at what is left."""

import itertools

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

EARLY = "backbone.net.blocks.0.mlp.fc1.weight"
LATE = "backbone.net.blocks.1.attn.qkv.weight"
"""Two parameters of the tiny detectors; the backward meets the second one first."""


def poison_gradient(model, name, value, *iterations):
    """One element of the gradient of parameter ``name`` is ``value`` in these iterations."""
    calls = itertools.count()

    def hook(grad):
        if next(calls) in iterations:
            grad = grad.clone()
            grad.flatten()[7] = value
        return grad

    model.get_parameter(name).register_hook(hook)


def poison_weight(model, name, value, iteration):
    """Row 0 of parameter ``name`` is ``value`` from the forward of ``iteration`` on."""
    calls = itertools.count()

    def hook(*_):
        if next(calls) == iteration:
            model.get_parameter(name).data[0] = value

    model.register_forward_pre_hook(hook)


def poison_loss(model, name, value, iteration):
    """``value`` is added to loss ``name``, so that its gradient is as it was."""
    calls = itertools.count()

    def hook(_, __, losses):
        added = value if next(calls) == iteration else 0.0
        return {**losses, name: losses[name] + added}

    model.register_forward_hook(hook)


def poison_step(value, iteration):
    """A step of any optimizer sets its first parameter to ``value``; returns a handle to end it."""
    calls = itertools.count()

    def hook(optimizer, *_):
        if next(calls) == iteration:
            optimizer.param_groups[0]["params"][0].data.fill_(value)

    return register_optimizer_step_post_hook(hook)


def finite_checkpoint(folder, *names):
    """The weights of the last of the only checkpoints, after a look that they are finite."""
    assert sorted(path.name for path in folder.glob("*.pth*")) == list(names)
    assert (folder / "last_checkpoint").read_text() == names[-1]
    weights = torch.load(folder / names[-1])["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    return weights
