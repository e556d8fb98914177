"""How a stack drops its activations in the forward and recomputes them in the backward.

Every F_i is part of the ordinary autograd graph, so parameters, hooks, DDP and FSDP see the network
that they know. As in torch's non-reentrant checkpoint, what autograd saves inside F_i is dropped,
and comes from a second call of F_i when a node of it asks. A checkpoint stores the inputs of its
functions for that; here they are recovered, from the last step to the first, by inverting the
coupling:

    forward, i = 1 ... n
        Forward.evaluate      F_i(h_{i-1}), with nothing saved inside
        Forward.advance       state_i from F_i, state_{i-1}, state_{i-2} (see ``streams``)
        Couple                saves the remainder of the step; the last one also state_n and
                              state_{n-1}
    backward, i = n ... 1
        Couple                the last one starts a Backward from state_n and state_{n-1};
                              each hands the gradient on and announces its step
        nodes inside F_i      ask for a dropped tensor: Backward.saved recomputes the step, that is,
                              calls F_i(h_{i-1}) again and inverts to state_{i-2}
    at the end
        Backward.check        compares the checksums of the recovered states
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from dr2net_d2.core.memory import assign, labelled
from dr2net_d2.core.replay import AutocastState, Surroundings, has_values
from dr2net_d2.core.steps import CAUSES, Call, Kind, Step
from dr2net_d2.core.streams import Stream


class FinalStreams(NamedTuple):
    """What a backward starts from; the last ``Couple`` saves it.

    ``state`` is state_n, ``previous`` state_{n-1}; ``checksums`` are those of state_{-1}, state_0,
    ... state_n, and ``exponent`` is that of the states, each None in an arithmetic without it.
    """

    state: Tensor
    previous: Tensor
    checksums: Tensor | None
    exponent: Tensor | None


class Forward:
    """What the steps of one forward share.

    Args:
        steps: in order.
        stream: the arithmetic.
        device: of the streams.
        inner_dtype: of the tensors that the functions are called with.

    Attributes:
        calls: one for each function called so far.
        states: (state_i, state_{i-1}) after i steps; None before the first and after the last.
        backward: the one under way, if any.
    """

    def __init__(
        self, steps: list[Step], stream: Stream, device: torch.device, inner_dtype: torch.dtype
    ) -> None:
        self.steps = steps
        self.stream = stream
        self.device = device
        self.inner_dtype = inner_dtype
        self._autocast = AutocastState(device)
        self.calls: list[Call] = []
        self.states: tuple[Tensor, Tensor] | None = None
        self.backward: Backward | None = None
        self._checksums: list[Tensor] = []

    def begin(self, x: Tensor, first_state: str) -> Tensor:
        """h_0, from x in the dtype of the decoded streams."""
        with labelled("streams"):
            state = self.stream.encode(x)
        previous = state if first_state == "copy" else torch.zeros_like(state)
        self.states = (state, previous)
        self._record(previous)
        self._record(state)
        with labelled("streams"):
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

        def recomputed(number: int) -> Tensor:
            return self.current_backward(index).saved(index, number)

        with saved_tensors_hooks(drop, recomputed), self._autocast():
            f = step(h1.to(self.inner_dtype))
        if h1._version != version:
            raise ValueError(
                f"{step.name} changes its input in place, but the shortcuts need the input as it "
                "was; let it begin with an operation that is not in place"
            )
        self.calls.append(Call(step, self._autocast, self.inner_dtype, h1.requires_grad, dropped))
        return f, before.changed()

    def advance(self, index: int, f: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """One step forward: h_i, and the remainder if there will be an inverse (``keep``)."""
        assert self.states is not None
        step, (state1, state2) = self.steps[index], self.states
        with labelled("streams"):
            state, remainder = self.stream.step(
                index + 1, f, state1, state2, step.alpha, step.beta, keep
            )
        if remainder is not None and step.beta:  # at beta 0 it is a state
            assign([remainder], "remainder bits")
        self.states = (state, state1)
        self._record(state)
        with labelled("streams"):
            return self.stream.decode(index + 1, state), remainder

    def final_streams(self) -> FinalStreams:
        """Hands over the states after the last step."""
        assert self.states is not None
        (state, previous), self.states = self.states, None
        checksums, self._checksums = self._checksums, []
        return FinalStreams(
            state,
            previous,
            torch.stack(checksums) if checksums else None,
            self.stream.exponent_tensor(),
        )

    def start_backward(self, final: FinalStreams) -> None:
        """Called by each backward that passes the last step; there may be several."""
        stream = self.stream.with_exponent(final.exponent)
        self.backward = Backward(self.calls, stream, final)
        # Runs when this backward has ended, however many of the steps it went through.
        Variable._execution_engine.queue_callback(partial(self._end, self.backward))

    def current_backward(self, index: int) -> Backward:
        """The backward under way, for a step that needs it.

        Raises:
            RuntimeError: the backward did not begin at the output of the stack.
        """
        if self.backward is None:
            _streams_missing(self.steps[index])
        return self.backward

    def _end(self, backward: Backward) -> None:
        self.backward = None
        backward.check()

    def _record(self, state: Tensor) -> None:
        checksum = self.stream.checksum(state)
        if checksum is not None:
            self._checksums.append(checksum)


@dataclass(frozen=True)
class Pending:
    """A step that the gradient has reached, with what its ``Couple`` had saved."""

    index: int
    remainder: Tensor | None
    surroundings: Surroundings


class Backward:
    """One backward through the steps of a forward, from the last to the first.

    A step is recomputed as late as possible, when a tensor inside it is asked for: by then the
    gradients of the steps after it are complete.

    Args:
        calls: those of the forward.
        stream: the arithmetic, at the exponent of the final streams.
        final: the streams to start from.
    """

    # Does not refer to the Forward, which refers to it: a failed backward is freed with the graph.
    def __init__(self, calls: list[Call], stream: Stream, final: FinalStreams) -> None:
        self._calls = calls
        self._stream = stream
        self._states = (final.state, final.previous)  # state_i, state_{i-1}; step i is the next
        self._checksums = final.checksums
        self._pending: Pending | None = None
        self._recomputed_index = -1
        self._recomputed: list[Tensor | None] = []  # dropped tensors of that step; None once read
        self._mismatches: list[tuple[int, Tensor]] = []

    def announce(self, pending: Pending) -> None:
        """The gradient has reached a step, which will be recomputed when something asks for it."""
        self._recompute()
        self._pending = pending
        if not self._calls[pending.index].dropped:
            self._recompute()

    def saved(self, index: int, number: int) -> Tensor:
        """A tensor that autograd would have saved inside a step; each can be read once."""
        if self._pending is not None and self._pending.index == index:
            self._recompute()
        step = self._calls[index].step
        if self._recomputed_index != index:
            _streams_missing(step)
        tensor, self._recomputed[number] = self._recomputed[number], None
        if tensor is None:
            raise RuntimeError(
                f"{step.name}: a saved tensor was read twice in one backward; an autograd Function "
                "inside must read ctx.saved_tensors once"
            )
        return tensor

    def _recompute(self) -> None:
        """Call the function of the pending step again, and take the step back."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        index = pending.index
        call, (state, state1) = self._calls[index], self._states
        with labelled("streams"):
            h1 = self._stream.decode(index, state1)
        h1 = h1.detach().requires_grad_(call.input_needs_grad)
        f, tensors = call.repeat(h1, pending.surroundings)
        self._recomputed_index, self._recomputed = index, [*tensors]
        with labelled("streams"):
            state2 = self._stream.inverse(
                index + 1, state, f, state1, pending.remainder, call.step.alpha, call.step.beta
            )
        self._states = (state1, state2)
        checksum = self._stream.checksum(state2)
        if checksum is not None and self._checksums is not None:
            self._mismatches.append((index, checksum != self._checksums[index]))

    def check(self) -> None:
        """Compare the checksums of the recovered states with those of the forward.

        Raises:
            RuntimeError: one differs; names the step.
        """
        if not self._mismatches or not has_values(self._mismatches[0][1]):
            return
        # One host synchronisation for all steps. The first that differs spoils those below it.
        differs = torch.stack([mismatch for _, mismatch in self._mismatches])
        if differs.any():
            index, _ = self._mismatches[int(differs.to(torch.uint8).argmax())]
            raise RuntimeError(
                f"{self._calls[index].step.name} gave another value when it was recomputed in "
                f"the backward, so the gradient is wrong; {CAUSES}"
            )


class Begin(torch.autograd.Function):
    """x -> h_0, rounded to the stream's arithmetic; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, forward: Forward, first_state: str, x: Tensor) -> Tensor:
        return forward.begin(x, first_state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad


class Couple(torch.autograd.Function):
    """(f, h_{i-1}, h_{i-2}) -> h_i in the stream's arithmetic; rounding has gradient 1.

    Of h_{i-1} and h_{i-2} only the edges of the autograd graph are used, for their gradients alpha
    and beta; the values come from the states of the ``Forward``. With the surroundings of a
    reversible step it saves what the recomputation needs. Without (None) the functions have saved
    their activations, and it saves nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forward: Forward,
        index: int,
        surroundings: Surroundings | None,
        f: Tensor,
        h1: Tensor,
        h2: Tensor | None,
    ) -> Tensor:
        keep = surroundings is not None and any(ctx.needs_input_grad)
        h, remainder = forward.advance(index, f, keep)
        ctx.forward_pass, ctx.index, ctx.f_dtype, ctx.keep = forward, index, f.dtype, keep
        if keep:
            assert surroundings is not None
            ctx.buffers = surroundings.buffers
            final = forward.final_streams() if index == len(forward.steps) - 1 else ()
            ctx.save_for_backward(*surroundings.tensors(), remainder, *final)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        forward, index = ctx.forward_pass, ctx.index
        if ctx.keep:
            saved = list(ctx.saved_tensors)
            if index == len(forward.steps) - 1:
                forward.start_backward(FinalStreams(*saved[-4:]))
                del saved[-4:]
            *tensors, remainder = saved
            surroundings = Surroundings.of_tensors(forward.device, ctx.buffers, tensors)
            forward.current_backward(index).announce(Pending(index, remainder, surroundings))
        alpha, beta = forward.steps[index].alpha, forward.steps[index].beta
        needs_f, needs_h1, needs_h2 = ctx.needs_input_grad[3:]
        grad_f = grad.to(ctx.f_dtype) if needs_f else None
        grad_h1 = (grad if alpha == 1 else alpha * grad) if needs_h1 else None
        grad_h2 = None
        if needs_h2:
            grad_h2 = grad_h1 if beta == alpha and needs_h1 else beta * grad
        return None, None, None, grad_f, grad_h1, grad_h2


def _streams_missing(step: Step) -> NoReturn:
    raise RuntimeError(
        f"the streams at {step.name} are not at hand: the backward of a reversible stack starts "
        "from its output; add losses on inner values to the loss on the output and call backward "
        "once"
    )
