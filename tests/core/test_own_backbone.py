"""Somebody else's network, converted by its blocks and what they add to their input."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

from dr2net_d2.core import Coefficients, ReversibleSequence, reversible_stacks
from dr2net_d2.training.coefficients import update_coefficients
from dr2net_d2.weights.plain_vit import plain_vit_state_dict
from tests.core.stacks import relative_error, run, tokens


# The example of docs/own_network.md.
def residual(block, x):
    """What a ConvNeXt block adds to its input."""
    return block.stochastic_depth(block.layer_scale * block.block(x))


def convert(network):
    for stage in (1, 3, 5, 7):  # between them the network downsamples
        blocks = network.features[stage]
        network.features[stage] = ReversibleSequence(blocks, Coefficients(), residuals=[residual])
    return network


def convnext():
    """A ConvNeXt with blocks that contribute, and little else of its size."""
    torch.manual_seed(0)
    settings = torchvision.models.convnext.CNBlockConfig
    network = torchvision.models.ConvNeXt(
        [settings(8, 16, 2), settings(16, 32, 1), settings(32, 64, 3), settings(64, None, 2)],
        stochastic_depth_prob=0.5,
        layer_scale=1.0,
        num_classes=10,
    )
    return network.train()


def test_at_1_0_it_computes_what_it_did():
    network, x = convnext(), tokens(2, 3, 64, 48)
    expected, expected_gradients = run(network, x)
    original = copy.deepcopy(network.state_dict())
    converted = convert(network)
    actual, gradients = run(converted, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients, expected_gradients) < 1e-5
    assert plain_vit_state_dict(converted).keys() == original.keys()
    converted.load_state_dict(original, strict=True)


@pytest.mark.parametrize("beta", [1 / 16, 1 / 2, 1])
def test_its_gradient_is_that_of_storing_everything(beta):
    network, x = convert(convnext()), tokens(2, 3, 64, 48)
    scalars = update_coefficients(network, lambda progress: (1 - beta, beta), 0, 1)
    assert scalars["dr2net/beta"] == beta
    out, gradients = run(network, x)
    for stack in reversible_stacks(network):
        assert stack.coefficients.values == (1 - beta, beta)
        stack.reversible = False
    oracle, reference = run(network, x)
    assert torch.equal(out, oracle)
    assert relative_error(gradients, reference) < 1e-6


def test_a_converted_network_is_copied_and_pickled():
    network, x = convert(convnext()), tokens(2, 3, 64, 48)
    expected = run(network, x)[1]
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert relative_error(run(twin, x)[1], expected) == 0


class Mixer(nn.Module):
    """A block of two residual functions, with shortcuts of its own."""

    def __init__(self, tokens, dim):
        super().__init__()
        self.across = nn.Linear(tokens, tokens)
        self.norm = nn.LayerNorm(dim)
        self.along = nn.Linear(dim, dim)

    def forward(self, x):
        x = x + mix_tokens(self, x)
        return x + mix_channels(self, x)


def mix_tokens(block, x):
    return block.across(x.mT).mT


def mix_channels(block, x):
    return block.along(block.norm(x)).relu()


class Scattered(nn.Module):
    """Keeps its blocks under their own names, and runs them by a stack that does not adopt them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Mixer(5, 8) for _ in range(4))
        self.stack = ReversibleSequence(
            self.blocks[1:], Coefficients(), residuals=[mix_tokens, mix_channels], adopt=False
        )

    def forward(self, x):
        return self.stack(self.blocks[0](x))


def test_blocks_that_are_not_adopted_keep_their_names_and_train():
    torch.manual_seed(0)
    network, x = Scattered(), tokens(2, 5, 8)
    assert len(network.stack.steps()) == 6
    assert {name.partition(".")[0] for name, _ in network.named_parameters()} == {"blocks"}
    assert sum("blocks" in key for key in network.state_dict()) == 4 * 6

    _, gradients = run(network, x)
    _, plain = run(nn.Sequential(*network.blocks), x)
    names = [name.replace("blocks.", "") for name in gradients]
    assert relative_error(dict(zip(names, gradients.values(), strict=True)), plain) < 1e-5

    twin = copy.deepcopy(network)
    assert twin.stack[0] is twin.blocks[1]
    assert relative_error(run(twin, x)[1], gradients) == 0


def test_a_step_is_named_after_its_function():
    network = Scattered()
    with torch.no_grad():
        network.blocks[2].along.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"after step 4 \(Mixer 1, mix_channels\)"):
        network(tokens(2, 5, 8))


def test_a_block_that_changes_its_shape_is_refused():
    downsample = nn.ModuleList([nn.Linear(8, 4)])
    stack = ReversibleSequence(downsample, Coefficients(), residuals=[lambda block, x: block(x)])
    with pytest.raises(ValueError, match=r"Linear 0, <lambda>\) returned \(2, 5, 4\)"):
        stack(tokens(2, 5, 8))
