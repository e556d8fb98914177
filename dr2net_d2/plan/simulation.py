"""Detectors on fake tensors: shapes and lifetimes of everything a GPU would hold, nothing computed.

A fake CPU tensor stands for one on a GPU: torch cannot differentiate fake CUDA tensors on a machine
without one. Two things that follow from the device or from values are made up for:

* ``CudaAutocast``: what autocast computes in float32 on a GPU and not on a CPU.
* ``DefiniteSizes``: how many anchors, proposals and boxes a mask selects. They follow a rule that
  the planner of an engine gives for each place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import Variable
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dr2net_d2.core.memory import tensors_in

aten = torch.ops.aten

Rule = Callable[[Tensor], int]
"""A boolean tensor -> how many of its elements are taken to be true."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have parameters without storage; everything else is real."""

    def moved(module: nn.Module, name: str, parameter: Any) -> Any:
        if not isinstance(parameter, nn.Parameter):
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def differentiate(loss: Tensor) -> None:
    """``loss.backward()``, with the function modes as they are.

    Those of torch are functions that a mode is told of, and out of force inside.
    """
    Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True
    )


class DefiniteSizes(TorchDispatchMode):
    """Gives the results of data-dependent operations on fake tensors a definite size or value.

    Truth values are true and numbers 1; masks select as many elements as the rule of the place
    says, all unless told; non-maximum suppression keeps every box; all values are the same one
    where distinct ones are asked for. Operations on real tensors alone, such as image sizes and
    the boxes of the ground truth, are done.

    To be entered within ``FakeTensorMode(allow_non_fake_inputs=True)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rule: Rule = Tensor.numel

    @contextmanager
    def within(self, rule: Rule) -> Iterator[None]:
        """Masks that are evaluated inside follow ``rule``, but never beyond their size."""
        outer, self._rule = self._rule, rule
        try:
            yield
        finally:
            self._rule = outer

    def during(self, owner: Any, method: str, rule: Rule) -> None:
        """Apply ``within`` to every call of a method of one object, for good."""
        inner = getattr(owner, method)

        @wraps(inner, assigned=())  # with the attributes of a callable object
        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.within(rule):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)

    @staticmethod
    def even(parts: int) -> Rule:
        """A rule for masks that come one after another, ``parts`` of them sharing all elements."""
        turn = itertools.cycle(range(parts))

        def rule(mask: Tensor) -> int:
            i, size = next(turn), mask.numel()
            return size * (i + 1) // parts - size * i // parts

        return rule

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        if tensors and not any(map(_is_fake, tensors)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten.index.Tensor:
            return func(args[0], self._integers(args[1]))
        if func in _PUTS and any(map(_is_mask, args[1])):
            return args[0]
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func is aten.masked_select.default:
            return args[0].new_empty(self._hits(args[1]))
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1)
        if func is aten.equal.default:
            return True
        if func is aten._unique2.default:
            counts = args[0].new_empty(1, dtype=torch.int64)
            return args[0].new_empty(1), args[0].new_empty(args[0].shape, dtype=torch.int64), counts
        if str(func) == "torchvision.nms.default":
            return args[0].new_empty(len(args[0]), dtype=torch.int64)
        return func(*args, **kwargs)

    def _hits(self, mask: Tensor) -> int:
        return min(mask.numel(), self._rule(mask))

    def _nonzero(self, mask: Tensor) -> Tensor:
        return mask.new_empty((self._hits(mask), mask.dim()), dtype=torch.int64)

    def _integers(self, indices: list[Any]) -> list[Any]:
        whole: list[Any] = []
        for index in indices:
            whole += self._nonzero(index).unbind(1) if _is_mask(index) else [index]
        return whole


_PUTS = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


def _is_fake(tensor: Tensor) -> bool:
    # In this order, as asking a tensor for an attribute is slow within a function mode.
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class CudaAutocast(TorchFunctionMode):
    """Within autocast, computes in float32 what a GPU's autocast does and a CPU's does not.

    It sees calls of functions and methods, not what they are made of: a function that is composed
    of others is listed itself. Recomputations in a backward are seen in that of ``differentiate``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _FLOAT32 or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if name in _SOFTMAX and args[0].dtype == torch.float16:
            # Reads half precision and writes single, without a copy between.
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            return _SOFTMAX[name](args[0], dim, True)
        if name in _WITH_DTYPE:
            if _is_low(args[0]):
                kwargs.setdefault("dtype", torch.float32)
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: x.float() if _is_low(x) else x, (args, kwargs))
        return func(*args, **kwargs)


_SOFTMAX = {"softmax": aten._softmax, "log_softmax": aten._log_softmax}
_WITH_DTYPE = {*_SOFTMAX, "sum", "prod", "cumsum"}
# Of https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32", what
# detectors call.
_FLOAT32 = _WITH_DTYPE | {
    *("layer_norm", "group_norm", "pow", "__pow__", "exp", "log", "rsqrt", "reciprocal", "norm"),
    *("binary_cross_entropy_with_logits", "cross_entropy", "nll_loss"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "kl_div"),
}


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
