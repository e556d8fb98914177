"""The autograd Functions behind ``ReversibleSequence``: one for each step of a stack.

Each step is a Function of its own, so parameter gradients are handed over as soon as the step is
done (DDP can reduce them while earlier steps still run). The tensors between steps carry gradients,
not memory: nothing saves them. The last step saves the two final streams, every step saves its
remainder bits, and the backward passes the rebuilt streams from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dr2net_d2.core.fixed_point import FixedPointStream, FloatStream
from dr2net_d2.core.replay import AutocastState, replayed_rng, rng_state


class Step(NamedTuple):
    """One residual function: its name for messages, the call, the parameters that it reads."""

    name: str
    function: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


class Pass:
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


class Begin(torch.autograd.Function):
    """x -> h_0, rounded to the stream's arithmetic; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, run: Pass, first_state: str, x: Tensor) -> Tensor:
        return run.begin(x, first_state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad


class Couple(torch.autograd.Function):
    """(f, h_{i-1}, h_{i-2}) -> h_i in the stream's arithmetic; rounding has gradient 1."""

    @staticmethod
    def forward(ctx: Any, run: Pass, f: Tensor, h1: Tensor, h2: Tensor | None) -> Tensor:
        ctx.run, ctx.f_dtype = run, f.dtype
        return run.advance(f, h1)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h2 = ctx.run.beta * grad if ctx.needs_input_grad[3] else None
        return None, grad.to(ctx.f_dtype), ctx.run.alpha * grad, grad_h2


class ReversibleStep(torch.autograd.Function):
    """(h_{i-1}, h_{i-2}, parameters of F_i) -> h_i, storing neither h nor anything inside F_i."""

    @staticmethod
    def forward(
        ctx: Any, run: Pass, index: int, h1: Tensor, h2: Tensor | None, *parameters: Tensor
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
