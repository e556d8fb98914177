"""One pass through a stack of residual functions, and the rebuilding of its streams.

Every F_i is part of the ordinary autograd graph: parameters, hooks, DDP and FSDP see the network
that they know. What autograd would save inside F_i is dropped in the forward and, as in torch's
non-reentrant checkpoint, comes from a recomputation when the first node of F_i asks for it. What a
checkpoint stores for that, the input of every function, is rebuilt here instead: the last
``Couple`` saves the two final streams, every ``Couple`` the remainder bits of its step, and each
recomputation recovers one state, from the last step down.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from dr2net_d2.core.fixed_point import FixedPointStream, FloatStream
from dr2net_d2.core.replay import AutocastState, Surroundings, has_values

Kind = tuple[torch.Size, torch.dtype]


class Step(NamedTuple):
    """One residual function: its name for messages, the call, its buffers, its coefficients."""

    name: str
    function: Callable[[Tensor], Tensor]
    buffers: list[Tensor]
    alpha: float
    beta: float

    def __call__(self, h1: Tensor) -> Tensor:
        """F_i(h_{i-1})."""
        f = self.function(h1)
        if f.shape != h1.shape:
            raise ValueError(
                f"{self.name} returned {tuple(f.shape)} for an input of {tuple(h1.shape)}; a "
                "residual function keeps the shape"
            )
        return f


class Due(NamedTuple):
    """A step whose recomputation is the next one, with what its ``Couple`` had saved for it."""

    position: int
    kept: Tensor | None
    surroundings: Surroundings


class Pass:
    """What the steps of one forward share, and hand to each other in its backward.

    Args:
        steps: in order.
        stream: the arithmetic.
        device: of the streams.
        inner_dtype: of the tensors that the functions are called with.
    """

    def __init__(
        self,
        steps: list[Step],
        stream: FixedPointStream | FloatStream,
        device: torch.device,
        inner_dtype: torch.dtype,
    ) -> None:
        self.steps = steps
        self.stream = stream
        self.device = device
        self.autocast = AutocastState(device)
        self.inner_dtype = inner_dtype
        self.states: tuple[Tensor, Tensor] | None = None  # (state_i, state_{i-1})
        self.recorded: list[Tensor] = []  # checksums of state_{-1}, state_0, state_1 ...
        self.checksums: Tensor | None = None  # the same, in the backward
        self.dropped: list[list[Kind]] = []  # what autograd would have saved inside each function
        self.needs_input_grad: list[bool] = []
        self.due: Due | None = None
        self.rebuilt: tuple[int, list[Tensor | None]] = (-1, [])
        self.mismatches: list[tuple[int, Tensor]] = []

    def begin(self, x: Tensor, first_state: str) -> Tensor:
        state = self.stream.encode(x)
        before = state if first_state == "copy" else torch.zeros_like(state)
        self.states = (state, before)
        self._record(before)
        self._record(state)
        return self.stream.decode(0, state)

    def evaluate(self, index: int, h1: Tensor) -> tuple[Tensor, Surroundings]:
        """F_i(h_{i-1}), saving nothing inside, and those of its surroundings that it changed."""
        step = self.steps[index]
        before = Surroundings.now(self.device, step.buffers)
        version = h1._version
        dropped: list[Kind] = []

        def drop(tensor: Tensor) -> int:
            dropped.append((tensor.shape, tensor.dtype))
            return len(dropped) - 1

        with (
            saved_tensors_hooks(drop, lambda number: self.saved(index, number)),
            self.autocast(),
        ):
            f = step(h1.to(self.inner_dtype))
        if h1._version != version:
            raise ValueError(
                f"{step.name} changes its input in place, which the shortcuts need as it was; "
                "begin with an operation that is not in place"
            )
        self.dropped.append(dropped)
        self.needs_input_grad.append(h1.requires_grad)
        return f, before.changed()

    def advance(self, index: int, f: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """One step forward; returns h_i and what its inverse will need besides the streams."""
        assert self.states is not None
        step, (state1, state2) = self.steps[index], self.states
        state, kept = self.stream.step(index + 1, f, state1, state2, step.alpha, step.beta, keep)
        self.states = (state, state1)
        self._record(state)
        return self.stream.decode(index + 1, state), kept

    def end(self) -> list[Tensor]:
        """What a backward begins with: the final streams, and what reads and checks fixed point."""
        assert self.states is not None
        end, recorded = [*self.states], self.recorded
        self.states, self.recorded = None, []
        if isinstance(self.stream, FixedPointStream):
            end += [torch.stack(recorded), torch.tensor(self.stream.exponent)]
        return end

    def restart(self, end: list[Tensor]) -> None:
        """A backward begins, at the last step.

        In a checkpoint around the stack the end is that of the repeated pass, which may have found
        another range.
        """
        self.states, self.due, self.rebuilt, self.mismatches = (end[0], end[1]), None, (-1, []), []
        if isinstance(self.stream, FixedPointStream):
            self.checksums = end[2]
            if has_values(end[3]):
                self.stream.exponent = int(end[3])
        # Runs when this backward has ended, however many of the steps it went through.
        Variable._execution_engine.queue_callback(self._finish)

    def schedule(self, due: Due) -> None:
        """The gradient has arrived at a step: it will be recomputed as soon as it is needed."""
        self._recompute()
        if self.states is None:
            self._streams_missing(due.position)
        self.due = due
        if not self.dropped[due.position]:
            self._recompute()

    def saved(self, index: int, number: int) -> Tensor:
        """A tensor that autograd would have saved inside a step; each may be asked for once."""
        if self.due is not None and self.due.position == index:
            self._recompute()
        if self.rebuilt[0] != index:
            self._streams_missing(index)
        tensors = self.rebuilt[1]
        tensor, tensors[number] = tensors[number], None
        if tensor is None:
            raise RuntimeError(
                f"{self.steps[index].name}: a saved tensor was read twice in one backward; an "
                "autograd Function inside must read ctx.saved_tensors once"
            )
        return tensor

    def _recompute(self) -> None:
        """Run the due function again and take its step back."""
        if self.due is None:
            return
        assert self.states is not None
        (index, kept, surroundings), self.due = self.due, None
        step, (state, state1) = self.steps[index], self.states
        h1 = self.stream.decode(index, state1).detach().requires_grad_(self.needs_input_grad[index])
        tensors: list[Tensor] = []
        with (
            surroundings.replayed(),
            torch.enable_grad(),
            saved_tensors_hooks(lambda tensor: tensors.append(tensor.detach()), _unreachable),
            self.autocast(),
        ):
            f = step(h1.to(self.inner_dtype)).detach()
        if [(tensor.shape, tensor.dtype) for tensor in tensors] != self.dropped[index]:
            raise RuntimeError(
                f"{step.name} saved {len(self.dropped[index])} tensors in the forward and "
                f"{len(tensors)}, or of other shapes, when it was recomputed; {CAUSES}"
            )
        self.rebuilt = (index, [*tensors])
        state2 = self.stream.inverse(index + 1, state, f, state1, kept, step.alpha, step.beta)
        self.states = (state1, state2)
        if self.checksums is not None:
            self.mismatches.append((index, _checksum(state2) != self.checksums[index]))

    def _record(self, state: Tensor) -> None:
        if isinstance(self.stream, FixedPointStream):
            self.recorded.append(_checksum(state))

    def _streams_missing(self, index: int) -> NoReturn:
        raise RuntimeError(
            f"the streams at {self.steps[index].name} are not at hand: the backward of a "
            "reversible stack starts from its output; add losses on inner values to one sum and "
            "call backward once"
        )

    def _finish(self) -> None:
        self.states, self.rebuilt, self.checksums = None, (-1, []), None
        found, self.mismatches = self.mismatches, []
        if not found or not has_values(found[0][1]):
            return
        # One host synchronisation for all steps. The first that differs spoils those below it.
        wrong = torch.stack([mismatch for _, mismatch in found])
        if wrong.any():
            name = self.steps[found[int(wrong.to(torch.uint8).argmax())][0]].name
            raise RuntimeError(
                f"{name} gave another value when it was recomputed in the backward, so the "
                f"gradient is wrong; {CAUSES}"
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
    """(f, h_{i-1}, h_{i-2}) -> h_i in the stream's arithmetic; rounding has gradient 1.

    With the surroundings of a reversible step it saves what rebuilding needs; without (None) the
    functions have saved their activations, and it saves nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Pass,
        index: int,
        surroundings: Surroundings | None,
        f: Tensor,
        h1: Tensor,
        h2: Tensor | None,
    ) -> Tensor:
        keep = surroundings is not None and any(ctx.needs_input_grad)
        h, kept = run.advance(index, f, keep)
        ctx.run, ctx.index, ctx.f_dtype, ctx.rebuild = run, index, f.dtype, keep
        if keep:
            assert surroundings is not None
            kept_tensors = [] if kept is None else [kept]
            end = run.end() if index == len(run.steps) - 1 else []
            parts = [[*surroundings.rng], surroundings.values, kept_tensors, end]
            ctx.buffers, ctx.lengths = surroundings.buffers, [len(part) for part in parts]
            ctx.save_for_backward(*chain(*parts))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run, index = ctx.run, ctx.index
        if ctx.rebuild:
            saved = iter(ctx.saved_tensors)
            rng, values, kept, end = ([*islice(saved, length)] for length in ctx.lengths)
            if end:
                run.restart(end)
            surroundings = Surroundings(run.device, rng, ctx.buffers, values)
            run.schedule(Due(index, kept[0] if kept else None, surroundings))
        alpha, beta = run.steps[index].alpha, run.steps[index].beta
        needs_f, needs_h1, needs_h2 = ctx.needs_input_grad[3:]
        grad_f = grad.to(ctx.f_dtype) if needs_f else None
        grad_h1 = (grad if alpha == 1 else alpha * grad) if needs_h1 else None
        grad_h2 = None
        if needs_h2:
            grad_h2 = grad_h1 if beta == alpha and needs_h1 else beta * grad
        return None, None, None, grad_f, grad_h1, grad_h2


CAUSES = (
    "usual causes: a nondeterministic kernel (torch.use_deterministic_algorithms), kernel "
    "autotuning between the passes (torch.backends.cudnn.benchmark), cuBLAS on several streams "
    "(CUBLAS_WORKSPACE_CONFIG), weights changed between forward and backward, state that the "
    "function keeps outside its buffers, randomness that does not come from torch's default "
    "generators"
)


def _checksum(state: Tensor) -> Tensor:
    return state.sum(dtype=state.dtype)


def _unreachable(_: object) -> NoReturn:
    raise AssertionError("the graph of a recomputation is never walked")
