"""The claims of exact arithmetic on random stacks; 2,000 of them with --hypothesis-profile=full."""

import copy
import math
import statistics
import warnings
from dataclasses import dataclass, replace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dr2net_d2.core import Coefficients, CoefficientSchedule, ReversibleSequence
from dr2net_d2.core.coupling import stream_growth
from dr2net_d2.core.schedule import SCHEDULES
from dr2net_d2.core.vit import Block, DropPath
from tests.core.property_figures import FIGURES
from tests.core.stacks import mlp, record_states, stack, tokens

AUTOCAST = "bf16 autocast"
DTYPES = {"float32": torch.float32, "float64": torch.float64, AUTOCAST: torch.float32}
FRESH_DRAWS = (8, 32)


@dataclass(frozen=True)
class Example:
    """A random stack and its input; ``blocks`` ViT blocks of two steps, then MLPs of one."""

    seed: int
    blocks: int
    mlps: int
    width: int
    shape: tuple[int, int, int]  # batch, rows, columns
    coefficients: tuple
    schedule: str
    earlier: tuple  # coefficients of a pass before, where the schedule begins
    dtype: str
    drop: float
    frozen: tuple[int, ...]
    input_needs_grad: bool
    scale: float
    first_state: str
    output: str


class Scaled(nn.Module):
    """A residual function whose values are as large as the streams."""

    def __init__(self, function, scale):
        super().__init__()
        self.function, self.scale = function, scale
        if hasattr(function, "branches"):
            self.branches = function.branches

    def forward(self, x, **branch):
        return self.scale * self.function(x, **branch)


def pairs():
    """(alpha, beta): beta on the grid, alpha + beta at most 1."""

    def pair(sixteenths, share):
        beta = sixteenths / 16
        return (share * (1 - beta) or float(beta == 0), beta)

    return st.builds(pair, st.integers(0, 16), st.floats(0, 1) | st.just(1.0))


def scheduled(kind):
    """((alpha, beta) at the begin of a schedule, (alpha, beta) somewhere along it)."""
    percent = st.integers(0, 100).map(lambda number: number / 100)
    updates = st.integers(2, 24) if kind == "alternating" else st.integers(0, 24)
    duration = percent.filter(bool)
    schedule = st.builds(CoefficientSchedule, st.just(kind), percent, percent, duration, updates)
    return st.builds(
        lambda schedule, progress: (schedule(0), schedule(progress)), schedule, percent
    )


@st.composite
def examples(draw):
    steps = draw(st.integers(1, 64))
    blocks = draw(st.just(0) | st.integers(0, steps // 2))
    functions = steps - blocks
    schedule = draw(st.sampled_from(["none", "one per function", *SCHEDULES]))
    if schedule == "none":
        earlier = coefficients = draw(pairs())
    elif schedule == "one per function":
        several = st.lists(pairs(), min_size=functions, max_size=functions)
        earlier = coefficients = tuple(zip(*draw(several), strict=True))
    else:
        earlier, coefficients = draw(scheduled(schedule))
    prefix = st.integers(0, functions).map(range)
    subset = st.integers(0, 2**functions - 1).map(
        lambda mask: [i for i in range(functions) if mask >> i & 1]
    )
    frozen = tuple(draw(st.just(()) | prefix | subset))
    return Example(
        seed=draw(st.integers(0, 2**31 - 1)),
        blocks=blocks,
        mlps=steps - 2 * blocks,
        width=8 * draw(st.integers(1, 4)),
        shape=draw(st.tuples(st.integers(1, 2), st.integers(2, 4), st.integers(1, 4))),
        coefficients=coefficients,
        schedule=schedule,
        earlier=earlier,
        dtype=draw(st.sampled_from(list(DTYPES))),
        drop=draw(st.sampled_from([0.0, 0.3])),
        frozen=frozen,
        input_needs_grad=draw(st.booleans()) or len(frozen) == functions,
        scale=10 ** (draw(st.integers(-30, 40)) / 10),
        first_state=draw(st.sampled_from(["copy", "zero"])),
        output=draw(st.sampled_from(["last", "mean"])),
    )


def build(example):
    torch.manual_seed(example.seed)
    rel_pos = bool(example.seed % 2)
    blocks = [
        Block(example.width, 2, 2.0, drop_path=example.drop, use_rel_pos=rel_pos,
              rel_pos_zero_init=False, input_size=(4, 4))
        for _ in range(example.blocks)
    ]  # fmt: skip
    mlps = [mlp(example.width, 2 * example.width, example.drop) for _ in range(example.mlps)]
    functions = [Scaled(function, example.scale) for function in blocks + mlps]
    for index in example.frozen:
        functions[index].requires_grad_(False)
    sequence = ReversibleSequence(
        functions,
        Coefficients(*example.earlier),
        first_state=example.first_state,
        output=example.output,
    )
    sequence.to(DTYPES[example.dtype])
    if example.earlier != example.coefficients:
        forward(sequence, example, max(FRESH_DRAWS) + 1, example.dtype == AUTOCAST)
        sequence.coefficients.set(*example.coefficients)
    return sequence


def forward(sequence, example, draw, autocast):
    """(input, output); ``draw`` numbers the input and the masks."""
    x = example.scale * tokens(*example.shape, example.width, seed=example.seed + 2 * draw)
    x = x.to(next(sequence.parameters()).dtype).requires_grad_(example.input_needs_grad)
    torch.manual_seed(example.seed + draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="alpha . beta > 1")
        return x, sequence(x)


def gradients(sequence, example, draw=0, autocast=False):
    """All gradients of one pass as one float64 vector."""
    sequence.zero_grad()
    x, out = forward(sequence, example, draw, autocast)
    out.backward(tokens(*out.shape, seed=example.seed + 2 * draw + 1).to(out.dtype))
    parts = [x.grad, *(parameter.grad for parameter in sequence.parameters())]
    return torch.cat([part.double().flatten() for part in parts if part is not None])


def distance(found, reference):
    """Relative to the reference, unless that is zero."""
    return ((found - reference).norm() / (reference.norm() or 1)).item()


def plain(sequence, dtype):
    twin = copy.deepcopy(sequence).to(dtype)
    twin.reversible, twin.arithmetic = False, "float"
    return twin


def error_ratio(example, sequence, draw, found=None):
    """Our error over that of plain training, both against float64, for one input.

    float64 training has no such reference. Its error is taken as that of float32 training times the
    ratio of the epsilons, and the distance to it as that of two gradients with independent errors.
    """
    epsilon = torch.finfo(torch.float32).eps
    autocast = example.dtype == AUTOCAST
    if found is None:
        found = gradients(sequence, example, draw, autocast)
    usual = gradients(plain(sequence, torch.float32), example, draw, autocast)
    reference = gradients(plain(sequence, torch.float64), example, draw)
    error = distance(found, reference)
    if example.dtype == "float64":
        error *= epsilon / torch.finfo(torch.float64).eps / math.sqrt(2)
    return max(error, epsilon) / max(distance(usual, reference), epsilon)


def recovered_states(example, sequence):
    """(gradients of a pass, number of stream elements that its backward did not recover)."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        there, back = record_states(monkeypatch)
        found = gradients(sequence, example, autocast=example.dtype == AUTOCAST)
    first = next(i for i in range(len(sequence) + 1) if i not in example.frozen)
    unneeded = 0 if example.input_needs_grad else first + min(first, example.blocks)
    assert len(there) == example.mlps + 2 * example.blocks
    assert len(back) == len(there) - unneeded
    both = zip(there[unneeded:], reversed(back), strict=True)
    return found, sum(int((state != recovered).sum()) for state, recovered in both)


STEEPEST = Example(
    seed=3, blocks=4, mlps=48, width=16, shape=(1, 3, 2), coefficients=(1.0, 1 / 8),
    schedule="alternating", earlier=(1.0, 1 / 8), dtype="float32", drop=0.0, frozen=(),
    input_needs_grad=True, scale=50.0, first_state="zero", output="mean",
)  # fmt: skip
"""Where the alternating schedule begins; the streams grow by a factor of hundreds."""
LEVELLED = replace(STEEPEST, coefficients=(0.5, 1 / 2))
"""Later on the same way they do not grow."""


@given(examples())
@hypothesis.example(STEEPEST)
@hypothesis.example(LEVELLED)
def test_states_are_recovered_and_gradients_are_exact(example):
    hypothesis.assume(example not in FIGURES.examples)  # other schedules may give the same pair
    sequence = build(example)
    oracle = copy.deepcopy(sequence)
    oracle.reversible = False
    found, mismatches = recovered_states(example, sequence)
    reference = gradients(oracle, example, autocast=example.dtype == AUTOCAST)
    oracle_error = distance(found, reference)
    # Two rounding errors are two draws of chance: on a given input one of a hundred networks has a
    # ratio above 1.5, as many one below its inverse. The geometric mean over fresh inputs, taken
    # where that happens, tells chance from a fault; a few do for most.
    ratio = error_ratio(example, sequence, 0, found)
    figures = {"state_mismatch": mismatches, "oracle_error": oracle_error, "error_ratio": ratio}
    for draws in FRESH_DRAWS:
        if ratio > 1.5:
            fresh = (error_ratio(example, sequence, number) for number in range(1, draws + 1))
            ratio = figures["error_ratio_on_fresh_draws"] = statistics.geometric_mean(fresh)
    FIGURES.note(example, **figures)
    assert mismatches == 0
    assert oracle_error <= 1e-6
    assert ratio <= 1.5
    FIGURES.examples.add(example)


def test_masks_do_not_depend_on_the_dtype():
    """Else no float64 oracle has the masks of a float32 network."""
    masks = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        ones = torch.ones(7, 3, dtype=dtype)
        masks += [(nn.functional.dropout(ones, 0.3) > 0, DropPath(0.3)(ones) > 0)]
    assert all(torch.equal(a, b) for mask in masks for a, b in zip(mask, masks[0], strict=True))


def test_growth_of_the_streams_is_warned_of():
    # The positive root of r^2 = r + 1/8 is (1 + sqrt(1.5)) / 2.
    root = (1 + 1.5**0.5) / 2
    assert stream_growth(1, 1 / 8) == pytest.approx(root)
    sequence = stack(48)
    sequence.coefficients.set(1.0, 1 / 8)
    with pytest.warns(UserWarning, match=f"grow {root**48:.3g}x over 48 steps"):
        sequence(tokens(2, 5, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequence(tokens(2, 5, 8))  # once
        stack(48)(tokens(2, 5, 8))
