"""A stack of residual functions whose activations are rebuilt in the backward, not stored.

    forward   h_i     = F_i(h_{i-1}) + alpha * h_{i-1} + beta * h_{i-2}      i = 1 ... n
    inverse   h_{i-2} = (h_i - F_i(h_{i-1}) - alpha * h_{i-1}) / beta

Each step is one autograd Function, so parameter gradients are handed over as soon as the step is
done (DDP can reduce them while earlier steps still run). The tensors between steps carry gradients,
not memory: nothing saves them. The last step saves the two final streams, every step saves its
remainder bits, and the backward passes the rebuilt streams from step to step.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dr2net_d2.core.coefficients import Coefficients
from dr2net_d2.core.coupling import couple, error_growth
from dr2net_d2.core.fixed_point import INTEGER_TYPES, FixedPointStream, FloatStream, StreamRange
from dr2net_d2.core.replay import AutocastState, replayed_rng, rng_state, set_rng_state
from dr2net_d2.core.schedule import BETA_GRID

logger = logging.getLogger(__name__)

ARITHMETICS = ("exact", "float")
FIRST_STATES = ("copy", "zero")
OUTPUTS = ("last", "mean")


class Step(NamedTuple):
    """One residual function: its name for messages, the call, the parameters that it reads."""

    name: str
    function: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


class _Pass:
    """What the steps of one forward share, and hand to each other in its backward."""

    def __init__(
        self,
        steps: list[Step],
        stream: FixedPointStream | FloatStream,
        alpha: float,
        beta: float,
        device: torch.device,
    ) -> None:
        self.steps = steps
        self.stream = stream
        self.alpha = alpha
        self.beta = beta
        self.autocast = AutocastState(device)
        self.first = len(steps)  # the earliest step that has a backward
        self.cursor = 0  # the step whose backward may run next
        self.states: tuple[Tensor, Tensor] | None = None  # (state_i, state_{i-1})
        self.checksums: list[Tensor] = []  # of state_{-1}, state_0, state_1 ...
        self.mismatches: list[tuple[int, Tensor]] = []

    def begin(self, x: Tensor, first_state: str) -> Tensor:
        state = self.stream.encode(x)
        before = state if first_state == "copy" else torch.zeros_like(state)
        self.states = (state, before)
        self._record(before)
        self._record(state)
        return self.stream.decode(state)

    def advance(self, f: Tensor, h1: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step forward; returns h_i and what its inverse will need besides the streams."""
        assert self.states is not None
        state1, state2 = self.states
        state, kept = self.stream.step(f, h1, state2, self.alpha, self.beta)
        self.states = (state, state1)
        self._record(state)
        return self.stream.decode(state), kept

    def retreat(self, index: int, f: Tensor, h1: Tensor, kept: Tensor | None) -> None:
        """One step back, checked against the forward."""
        assert self.states is not None
        state, state1 = self.states
        state2 = self.stream.inverse(state, f, h1, kept, self.alpha, self.beta)
        self.states = (state1, state2)
        if self.checksums:
            self.mismatches.append((index, state2.sum() != self.checksums[index]))
        if index == self.first:
            self._finish()
        self.cursor = index - 1

    def _record(self, state: Tensor) -> None:
        if isinstance(self.stream, FixedPointStream):
            self.checksums.append(state.sum())

    def _finish(self) -> None:
        self.states = None
        found, self.mismatches = self.mismatches, []
        # One host synchronisation for all steps.
        if found and bool((wrong := torch.stack([mismatch for _, mismatch in found])).any()):
            name = self.steps[found[int(wrong.to(torch.uint8).argmax())][0]].name
            raise RuntimeError(
                f"{name} gave another value when it was recomputed in the backward, so the "
                "gradient would be wrong. Usual causes: a nondeterministic kernel "
                "(torch.use_deterministic_algorithms), kernel autotuning between the passes "
                "(torch.backends.cudnn.benchmark), weights or buffers changed between forward and "
                "backward, randomness that does not come from torch's global generators"
            )


class _Begin(torch.autograd.Function):
    """x -> h_0, rounded to the stream's arithmetic; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, run: _Pass, first_state: str, x: Tensor) -> Tensor:
        return run.begin(x, first_state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad


class _Couple(torch.autograd.Function):
    """(f, h_{i-1}, h_{i-2}) -> h_i in the stream's arithmetic; rounding has gradient 1."""

    @staticmethod
    def forward(ctx: Any, run: _Pass, f: Tensor, h1: Tensor, h2: Tensor | None) -> Tensor:
        ctx.run, ctx.f_dtype = run, f.dtype
        return run.advance(f, h1)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h2 = ctx.run.beta * grad if ctx.needs_input_grad[3] else None
        return None, grad.to(ctx.f_dtype), ctx.run.alpha * grad, grad_h2


class _ReversibleStep(torch.autograd.Function):
    """(h_{i-1}, h_{i-2}, parameters of F_i) -> h_i, storing neither h nor anything inside F_i."""

    @staticmethod
    def forward(
        ctx: Any, run: _Pass, index: int, h1: Tensor, h2: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        before = rng_state(h1.device)
        with run.autocast():
            f = run.steps[index].function(h1)
        h, kept = run.advance(f, h1)
        if any(ctx.needs_input_grad):
            run.first = min(run.first, index)
            drew = not all(map(torch.equal, before, rng_state(h1.device)))
            final = run.states if index == len(run.steps) - 1 else None
            ctx.run, ctx.index = run, index
            ctx.layout = (kept is not None, final is not None)
            kept_tensors = () if kept is None else (kept,)
            ctx.save_for_backward(*(before if drew else ()), *kept_tensors, *(final or ()))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run, index = ctx.run, ctx.index
        step = run.steps[index]
        has_kept, is_last = ctx.layout
        saved = list(ctx.saved_tensors)
        if is_last:
            run.states = (saved.pop(-2), saved.pop(-1))
            run.mismatches = []
        elif run.cursor != index or run.states is None:
            raise RuntimeError(
                f"the streams at {step.name} are not at hand: the backward of a reversible stack "
                "runs from its last step down, once per call of backward"
            )
        kept = saved.pop() if has_kept else None
        needs_h1, needs_h2 = ctx.needs_input_grad[2:4]

        h1 = run.stream.decode(run.states[1]).detach().requires_grad_(needs_h1)
        wanted = [h1] * needs_h1 + step.parameters
        with replayed_rng(h1.device, tuple(saved)), torch.enable_grad(), run.autocast():
            f = step.function(h1)
        run.retreat(index, f.detach(), h1.detach(), kept)
        grads: list[Tensor | None] = [None] * len(wanted)
        if f.requires_grad:
            grads = list(torch.autograd.grad(f, wanted, grad.to(f.dtype), allow_unused=True))

        grad_h1 = grad_h2 = None
        if needs_h1:
            through_f = grads.pop(0)
            grad_h1 = run.alpha * grad
            if through_f is not None:
                grad_h1 += through_f
        if needs_h2:
            grad_h2 = run.beta * grad
        return None, None, grad_h1, grad_h2, *grads


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
            set_rng_state(x.device, before)
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
            set_rng_state(x.device, before)
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
        run = _Pass(steps, stream, *self.coefficients.values, x.device)
        h1: Tensor = _Begin.apply(run, self.first_state, x)
        h2 = h1 if self.first_state == "copy" else None
        for index, step in enumerate(steps):
            if self.reversible:
                h = _ReversibleStep.apply(run, index, h1, h2, *step.parameters)
            elif self.arithmetic == "exact":
                h = _Couple.apply(run, step.function(h1), h1, h2)
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
        """Widen the range to the peak of a floating-point pass over ``x``."""

        def observe(name: str, h: Tensor) -> None:
            peak = float(h.abs().amax())
            if not peak < float("inf"):
                raise FloatingPointError(
                    f"the residual stream after {name} has a peak of {peak}: the input or the "
                    "weights are not finite, or training has diverged"
                )
            self.stream_range.widen(peak)

        observe("the input", x)
        with AutocastState(x.device)():
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
