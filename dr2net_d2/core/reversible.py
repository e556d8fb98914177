"""A stack of residual functions whose activations are recomputed in the backward, not stored.

forward   h_i     = F_i(h_{i-1}) + alpha * h_{i-1} + beta * h_{i-2}      i = 1 ... n
inverse   h_{i-2} = (h_i - F_i(h_{i-1}) - alpha * h_{i-1}) / beta
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dr2net_d2.core.coefficients import Coefficients
from dr2net_d2.core.coupling import couple, error_growth, stream_growth
from dr2net_d2.core.passes import Begin, Couple, Forward
from dr2net_d2.core.ranks import groups_of_shards, largest
from dr2net_d2.core.replay import AutocastState, Surroundings, has_values
from dr2net_d2.core.schedule import BETA_GRID
from dr2net_d2.core.steps import Step
from dr2net_d2.core.stream_range import StreamRange, bits_for_growth
from dr2net_d2.core.streams import INTEGER_TYPES, FixedPointStream, FloatStream, Stream

logger = logging.getLogger(__name__)

ARITHMETICS = ("exact", "float")
FIRST_STATES = ("copy", "zero")
OUTPUTS = ("last", "mean")
STREAM_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
MAX_GROWTH = 100
"""Factor by which streams may grow over a stack before a warning is given."""


class ReversibleSequence(nn.Module):
    """Residual functions coupled by Dr2Net's two coefficients.

    Args:
        functions: modules computing F(h) without the shortcut, ``(..., C) -> (..., C)``. A module
            with an attribute ``branches = n`` gives n steps, called as ``module(h, branch=j)``; a
            ViT block gives two. Their values may depend on the input, torch's random state and
            their buffers, on nothing else. Buffers that a call updates, such as BatchNorm's
            statistics, are updated once. Blocks that add their shortcuts themselves need
            ``residuals``.
        coefficients: one pair for all, or one per function; read at each forward.
        reversible: False runs the same arithmetic under plain autograd, storing everything.
        arithmetic: "exact", fixed-point streams, inverted bit for bit; or "float", the literature's
            way, whose reconstruction error grows per step by ``coupling.error_growth``.
        first_state: h_{-1}: "copy" of h_0, or "zero".
        output: the "last" stream, or the "mean" of the last two.
        residuals: functions ``(block, h) -> F(h)`` that call the modules of a block, in order; each
            gives what the block adds to its input there, and is one step. The block itself is not
            called, so its own hooks do not fire; those of its modules do.
        adopt: register the functions as children 0, 1 ... . False leaves them children of another
            module, so that its parameters keep their names.

    Any residual network can be converted by passing its blocks, one stage at a time. A stack that
    replaces their container has the same keys in the state dict, and computes the same as long as
    the coefficients are (1, 0), those of a new ``Coefficients()``:

        def residual(block, x):
            return block.stochastic_depth(block.layer_scale * block.block(x))

        network = torchvision.models.convnext_tiny()
        for stage in (1, 3, 5, 7):
            blocks = network.features[stage]
            network.features[stage] = ReversibleSequence(
                blocks, Coefficients(), residuals=[residual]
            )

    Hooks on the functions fire as under torch's non-reentrant checkpoint: forward hooks in the
    forward and once more when the function is recomputed, backward hooks once.

    Shape: x ``(..., C)``, any floating dtype -> h_n of the same shape and dtype. The streams are
    float64 for a float64 input, else float32. Without gradients the stack runs in floating point,
    which agrees with the exact streams to 2^-k.

    Raises:
        TypeError: the input is not of a floating dtype.
        FloatingPointError: a stream is nan or infinite.
        OverflowError: a function gives larger values each time it is called.

    Warns:
        UserWarning: once, if alpha + beta > 1 lets the streams grow more than ``MAX_GROWTH`` times;
            or, in float arithmetic, if the inversion is too inexact for a gradient.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        coefficients: Coefficients,
        reversible: bool = True,
        arithmetic: str = "exact",
        first_state: str = "copy",
        output: str = "last",
        *,
        residuals: Sequence[Callable[[Any, Tensor], Tensor]] = (),
        adopt: bool = True,
    ) -> None:
        super().__init__()
        functions = tuple(functions)
        if not functions:
            raise ValueError("a ReversibleSequence needs at least one function")
        self._length = len(functions)
        # A tuple hides modules from registration.
        self._elsewhere = () if adopt else functions
        for index, function in enumerate(functions if adopt else ()):
            self.add_module(str(index), function)
        self.residuals = tuple(residuals)
        self.coefficients = coefficients
        self.stream_range = StreamRange()
        self.reversible = reversible
        self.arithmetic = arithmetic
        self.first_state = _one_of("first_state", first_state, FIRST_STATES)
        self.output = _one_of("output", output, OUTPUTS)
        self.overflows = 0

    @property
    def arithmetic(self) -> str:
        return self._arithmetic

    @arithmetic.setter
    def arithmetic(self, value: str) -> None:
        self._arithmetic = _one_of("arithmetic", value, ARITHMETICS)
        self.coefficients.grid = BETA_GRID if value == "exact" else None
        self.coefficients.set(*self.coefficients.values)
        self._warned = False

    @property
    def fraction_bits(self) -> int:
        """Fractional bits of the last 32-bit stream in the next pass; follows the running peak."""
        return self.stream_range.exponent(torch.int32)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> nn.Module:
        position = range(len(self))[index]
        return self._elsewhere[position] if self._elsewhere else self.get_submodule(str(position))

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    def steps(self) -> list[Step]:
        """The residual functions in order, each with its coefficients as they are now."""
        steps: list[Step] = []
        pairs = self.coefficients.pairs(len(self))
        for index, (module, (alpha, beta)) in enumerate(zip(self, pairs, strict=True)):
            buffers = list(module.buffers())
            for detail, function in self._residual_functions(module):
                name = f"step {len(steps) + 1} ({type(module).__name__} {index}{detail})"
                steps.append(Step(name, function, buffers, alpha, beta))
        return steps

    def _residual_functions(
        self, module: nn.Module
    ) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """The steps of a module, each with a suffix for its name in messages."""
        if self.residuals:
            return [
                (f", {getattr(residual, '__name__', residual)}", partial(residual, module))
                for residual in self.residuals
            ]
        if hasattr(module, "branches"):
            branches = range(module.branches)  # type: ignore[arg-type]
            return [(f", branch {branch}", partial(module, branch=branch)) for branch in branches]
        return [("", module)]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in STREAM_DTYPES:
            raise TypeError(f"the input is {x.dtype}; use one of {sorted(map(str, STREAM_DTYPES))}")
        steps = self.steps()
        if not torch.is_grad_enabled() or not x.numel():
            return self._plain(x, steps)
        self._warn_once(x.dtype, steps)
        if self.arithmetic == "float" and not self.reversible:
            return self._plain(x, steps)
        return self._train(x, steps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train(self, x: Tensor, steps: list[Step]) -> Tensor:
        if self.arithmetic == "float":
            return self._run(x, steps, FloatStream(STREAM_DTYPES[x.dtype]))
        before = _surroundings(x, steps)
        groups = groups_of_shards(chain.from_iterable(module.parameters() for module in self))
        offsets = bits_for_growth(_growths(steps))
        if not has_values(x):
            return self._run(x, steps, self._fixed_point(x, offsets))
        self.stream_range.follow(offsets[0])
        if not self.stream_range.measured:
            self._measure(x, steps, offsets, groups)
        stream = self._fixed_point(x, offsets)
        out, peak = self._attempt(x, steps, stream, groups)
        if out is None:
            self.overflows += 1
            before.restore()
            self._measure(x, steps, offsets, groups)
            bits, stream = stream.exponent, self._fixed_point(x, offsets)
            logger.warning(
                "the residual streams outgrew %d fractional bits; the pass is repeated with %d "
                "(passes repeated so far: %d)",
                bits,
                stream.exponent,
                self.overflows,
            )
            out, peak = self._attempt(x, steps, stream, groups)
        if out is None:
            raise OverflowError(
                f"the residual streams were measured to peak at {self.stream_range.largest:g}, but "
                f"reached {peak:g} when the pass was repeated; the functions must give the same "
                "values each time they are called"
            )
        return out

    def _fixed_point(self, x: Tensor, offsets: list[int]) -> FixedPointStream:
        """The arithmetic of the next pass over x, with as many bits as its range allows."""
        dtype = STREAM_DTYPES[x.dtype]
        return FixedPointStream(self.stream_range.exponent(INTEGER_TYPES[dtype]), dtype, offsets)

    def _attempt(
        self,
        x: Tensor,
        steps: list[Step],
        stream: FixedPointStream,
        groups: list[dist.ProcessGroup],
    ) -> tuple[Tensor | None, float]:
        """The output, None if the streams overflow, and their peak on all ranks of the groups."""
        out = self._run(x, steps, stream)
        peak = largest(stream.peak(), groups, x.device)
        if stream.overflowed(peak):
            return None, peak
        self.stream_range.widen(peak)
        return out, peak

    def _run(self, x: Tensor, steps: list[Step], stream: Stream) -> Tensor:
        """A pass with gradients, in a stream's arithmetic."""
        forward = Forward(steps, stream, x.device, _inner_dtype(x))
        h1: Tensor = Begin.apply(forward, self.first_state, x.to(stream.dtype))
        h2 = h1 if self.first_state == "copy" else None
        for index, step in enumerate(steps):
            if self.reversible:
                f, surroundings = forward.evaluate(index, h1)
            else:
                f, surroundings = step(h1.to(forward.inner_dtype)), None
            h = Couple.apply(forward, index, surroundings, f, h1, h2)
            h1, h2 = h, h1
        forward.states = None  # where no Couple has saved them, the graph should not keep them
        return self._output(h1, h2).to(x.dtype)

    def _plain(
        self, x: Tensor, steps: list[Step], observe: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """A pass in floating point; ``observe`` is called with i and h_i after each step."""
        h1, inner_dtype = x.to(STREAM_DTYPES[x.dtype]), _inner_dtype(x)
        h2 = h1 if self.first_state == "copy" else torch.zeros_like(h1)
        for i, step in enumerate(steps, 1):
            h = couple(step(h1.to(inner_dtype)), h1, h2, step.alpha, step.beta)
            h1, h2 = h, h1
            if observe is not None:
                observe(i, h)
        return self._output(h1, h2).to(x.dtype)

    def _output(self, h1: Tensor, h2: Tensor | None) -> Tensor:
        if self.output == "last":
            return h1
        assert h2 is not None
        return (h1 + h2) / 2

    @torch.no_grad()
    def _measure(
        self, x: Tensor, steps: list[Step], offsets: list[int], groups: list[dist.ProcessGroup]
    ) -> None:
        """Widen the range to the peak of a floating-point pass over x.

        The pass draws the random numbers that the next one will draw, and leaves generators and
        buffers as they are.

        Raises:
            FloatingPointError: a stream is not finite; names the step.
        """

        def observe(i: int, h: Tensor) -> None:
            peak = float(h.abs().amax()) * 2.0 ** offsets[i]
            if not peak < float("inf"):
                raise FloatingPointError(
                    f"the residual stream after {steps[i - 1].name if i else 'the input'} has a "
                    f"peak of {peak}: the input or the weights are not finite, or training has "
                    "diverged"
                )
            self.stream_range.widen(peak)

        observe(0, x)
        with _surroundings(x, steps).replayed(), AutocastState(x.device)():
            self._plain(x, steps, observe)
        self.stream_range.widen(largest(self.stream_range.largest, groups, x.device))

    def _warn_once(self, dtype: torch.dtype, steps: list[Step]) -> None:
        if self._warned:
            return
        growth = math.prod(_growths(steps))
        if growth > MAX_GROWTH:
            self._warned = True
            warnings.warn(
                f"alpha + beta > 1 lets the streams grow {growth:.3g}x over {len(steps)} steps; "
                "keep alpha + beta <= 1",
                stacklevel=3,
            )
        if self.arithmetic == "exact" or not self.reversible:
            return
        # At beta 0 the state is kept, and its error starts again at 0.
        growths = [error_growth(step.alpha, step.beta) for step in steps if step.beta]
        error = torch.finfo(dtype).eps * math.prod(growths)
        if error > 1e-3:
            self._warned = True
            warnings.warn(
                f"floating-point inversion amplifies rounding errors {max(growths):.3g}x per step "
                f"(alpha {steps[0].alpha:g}, beta {steps[0].beta:g}, {len(steps)} steps), so the "
                "gradient will be wrong; arithmetic='exact' has no such error",
                stacklevel=3,
            )


def reversible_stacks(model: nn.Module) -> list[ReversibleSequence]:
    """The stacks inside a model, in the order of registration; empty for a plain network."""
    return [module for module in model.modules() if isinstance(module, ReversibleSequence)]


def _surroundings(x: Tensor, steps: list[Step]) -> Surroundings:
    buffers = {id(buffer): buffer for step in steps for buffer in step.buffers}
    return Surroundings.now(x.device, list(buffers.values()))


def _growths(steps: list[Step]) -> list[float]:
    return [stream_growth(step.alpha, step.beta) for step in steps]


def _inner_dtype(x: Tensor) -> torch.dtype:
    """The dtype that functions are called with: that of x, or of the streams under autocast."""
    return STREAM_DTYPES[x.dtype] if AutocastState(x.device).enabled else x.dtype


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {allowed}")
    return value
