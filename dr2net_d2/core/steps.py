"""One residual function of a stack, and how its call is repeated in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dr2net_d2.core.replay import AutocastState, Surroundings

Kind = tuple[torch.Size, torch.dtype]

CAUSES = (
    "usual causes: a nondeterministic kernel (torch.use_deterministic_algorithms), kernel "
    "autotuning between the passes (torch.backends.cudnn.benchmark), cuBLAS on several streams "
    "(CUBLAS_WORKSPACE_CONFIG), weights changed between forward and backward, state that the "
    "function keeps outside its buffers, randomness that does not come from torch's default "
    "generators"
)


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
                "residual function must keep the shape of its input"
            )
        return f


class Call(NamedTuple):
    """How a forward called a function, so that the backward can repeat it.

    ``dropped`` has the shape and dtype of each tensor that autograd would have saved, in order.
    """

    step: Step
    autocast: AutocastState
    inner_dtype: torch.dtype
    input_needs_grad: bool
    dropped: list[Kind]

    def repeat(self, h1: Tensor, surroundings: Surroundings) -> tuple[Tensor, list[Tensor]]:
        """F_i(h_{i-1}), and the tensors that autograd would have saved.

        Raises:
            RuntimeError: they are not those of the forward.
        """
        tensors: list[Tensor] = []
        with (
            surroundings.replayed(),
            torch.enable_grad(),
            saved_tensors_hooks(lambda tensor: tensors.append(tensor.detach()), _never_unpacked),
            self.autocast(),
        ):
            f = self.step(h1.to(self.inner_dtype)).detach()
        if [(tensor.shape, tensor.dtype) for tensor in tensors] != self.dropped:
            raise RuntimeError(
                f"{self.step.name} saved {len(tensors)} tensors when it was recomputed, which "
                f"differ in number, shape or dtype from the {len(self.dropped)} of the forward; "
                f"{CAUSES}"
            )
        return f, tensors


def _never_unpacked(_: object) -> NoReturn:
    raise AssertionError("the graph of a recomputation is never walked")
