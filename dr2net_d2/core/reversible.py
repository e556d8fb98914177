"""A stack of residual functions whose activations are rebuilt in the backward, not stored.

forward   h_i     = F_i(h_{i-1}) + alpha * h_{i-1} + beta * h_{i-2}      i = 1 ... n
inverse   h_{i-2} = (h_i - F_i(h_{i-1}) - alpha * h_{i-1}) / beta
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dr2net_d2.core.coefficients import Coefficients
from dr2net_d2.core.coupling import couple, error_growth
from dr2net_d2.core.fixed_point import INTEGER_TYPES, FixedPointStream, FloatStream, StreamRange
from dr2net_d2.core.replay import AutocastState, replayed_rng, rng_state, set_rng_state
from dr2net_d2.core.schedule import BETA_GRID
from dr2net_d2.core.steps import Begin, Couple, Pass, ReversibleStep, Step

logger = logging.getLogger(__name__)

ARITHMETICS = ("exact", "float")
FIRST_STATES = ("copy", "zero")
OUTPUTS = ("last", "mean")


class ReversibleSequence(nn.Module):
    """Residual functions coupled by Dr2Net's two coefficients.

    Args:
        functions: modules computing F(h) without the shortcut, ``(..., C) -> (..., C)``. A module
            with an attribute ``branches = n`` and a method ``branch_parameters(j)`` gives n steps,
            called as ``module(h, j)``; a ViT block gives two. They must be deterministic given
            torch's random state, and keep no state of their own.
        coefficients: the pair used by every step, read at each forward.
        reversible: False runs the same arithmetic under plain autograd, storing everything.
        arithmetic: "exact", fixed-point streams, inverted bit for bit; or "float", the literature's
            way, whose reconstruction error grows per step by ``coupling.error_growth``.
        first_state: h_{-1}: "copy" of h_0, or "zero".
        output: the "last" stream, or the "mean" of the last two.

    Shape: x ``(..., C)`` float32 or float64 (half types inside autocast) -> h_n of the same shape.
    Without gradients the stack runs in floating point; it agrees with the exact streams to 2^-k.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        coefficients: Coefficients,
        reversible: bool = True,
        arithmetic: str = "exact",
        first_state: str = "copy",
        output: str = "last",
    ) -> None:
        super().__init__()
        for index, function in enumerate(functions):
            self.add_module(str(index), function)
        self._functions = len(self._modules)
        if not self._functions:
            raise ValueError("a ReversibleSequence needs at least one function")
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
        """Fractional bits of float32 streams in the next pass; it follows the running peak."""
        return self.stream_range.exponent(torch.float32)

    def __len__(self) -> int:
        return self._functions

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(range(len(self))[index]))

    def steps(self) -> list[Step]:
        """The residual functions in order, with the trainable parameters of each."""
        steps: list[Step] = []
        for index in range(len(self)):
            module = self[index]
            for branch in range(getattr(module, "branches", 1)):
                steps.append(_step(module, index, branch, len(steps) + 1))
        return steps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        if x.dtype not in INTEGER_TYPES:
            raise TypeError(
                f"the streams are {x.dtype}; use float32 or float64, autocast for half precision"
            )
        if not torch.is_grad_enabled():
            return self._infer(x)
        if self.arithmetic == "float":
            self._warn_of_error_growth(x.dtype)
            return self._run(x, FloatStream())
        before = rng_state(x.device)
        if not self.stream_range.measured:
            self._measure(x)
        for _ in range(2):
            stream = FixedPointStream(self.stream_range.exponent(x.dtype), x.dtype)
            out = self._run(x, stream)
            peak = stream.peak()
            if not stream.overflowed(peak):
                self.stream_range.widen(peak)
                return out
            self.overflows += 1
            set_rng_state(x.device, before)
            self._measure(x)
            logger.warning(
                "residual streams outgrew 2^%d fractional bits; the pass is repeated with 2^%d "
                "(%d such passes so far)",
                stream.exponent,
                self.stream_range.exponent(x.dtype),
                self.overflows,
            )
        raise OverflowError(f"the residual streams overflow even at a measured peak of {peak}")

    def _run(self, x: Tensor, stream: FixedPointStream | FloatStream) -> Tensor:
        steps = self.steps()
        run = Pass(steps, stream, *self.coefficients.values, x.device)
        h1: Tensor = Begin.apply(run, self.first_state, x)
        h2 = h1 if self.first_state == "copy" else None
        for index, step in enumerate(steps):
            if self.reversible:
                h = ReversibleStep.apply(run, index, h1, h2, *step.parameters)
            elif self.arithmetic == "exact":
                h = Couple.apply(run, step.function(h1), h1, h2)
            else:
                before = torch.zeros_like(h1) if h2 is None else h2
                h = couple(step.function(h1), h1, before, run.alpha, run.beta)
            h1, h2 = h, h1
        run.states = None
        return self._output(h1, h2)

    def _infer(self, x: Tensor, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
        alpha, beta = self.coefficients.values
        h1, h2 = x, x if self.first_state == "copy" else torch.zeros_like(x)
        for step in self.steps():
            h = couple(step.function(h1), h1, h2, alpha, beta)
            h1, h2 = h, h1
            if observe is not None:
                observe(step.name, h)
        return self._output(h1, h2)

    def _output(self, h1: Tensor, h2: Tensor | None) -> Tensor:
        if self.output == "last":
            return h1
        assert h2 is not None
        return (h1 + h2) / 2

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        """Widen the range to the peak of a floating-point pass over ``x``.

        The pass draws what the next one will draw: it leaves the random streams as they are.
        """

        def observe(name: str, h: Tensor) -> None:
            peak = float(h.abs().amax())
            if not peak < float("inf"):
                raise FloatingPointError(
                    f"the residual stream after {name} has a peak of {peak}: the input or the "
                    "weights are not finite, or training has diverged"
                )
            self.stream_range.widen(peak)

        observe("the input", x)
        with replayed_rng(x.device, rng_state(x.device)), AutocastState(x.device)():
            self._infer(x, observe)

    def _warn_of_error_growth(self, dtype: torch.dtype) -> None:
        alpha, beta = self.coefficients.values
        if not self.reversible or beta == 0 or self._warned:
            return
        growth, steps = error_growth(alpha, beta), len(self.steps())
        if math.log(torch.finfo(dtype).eps) + steps * math.log(growth) > math.log(1e-3):
            self._warned = True
            warnings.warn(
                f"floating-point inversion at alpha={alpha:g}, beta={beta:g} amplifies rounding "
                f"errors {growth:.3g}x per step over {steps} steps, so the gradient will be wrong; "
                "arithmetic='exact' has no such error",
                stacklevel=3,
            )


def _step(module: nn.Module, index: int, branch: int, number: int) -> Step:
    name = f"step {number} ({type(module).__name__} {index}"
    if not hasattr(module, "branches"):
        parameters = _trainable(module.parameters())
        return Step(f"{name})", module, parameters)
    parameters = _trainable(module.branch_parameters(branch))  # type: ignore[operator]
    return Step(f"{name}, branch {branch})", lambda h: module(h, branch), parameters)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {allowed}")
    return value
