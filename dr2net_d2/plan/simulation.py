"""Detectors on fake tensors: shapes and lifetimes of everything a GPU would hold, nothing computed.

Fake CPU tensors stand in for tensors on a GPU, because torch cannot differentiate fake CUDA tensors
on a machine without a GPU. Two modes supply what depends on the device or on values:

* ``CudaAutocast``: which operations autocast computes in float32 on a GPU but not on a CPU.
* ``DefiniteSizes``: how many anchors, proposals and boxes a mask selects. Each engine sets a rule
  for the code that evaluates the mask.
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
"""A boolean tensor -> the number of its elements that are assumed to be true."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules with parameters on the meta device, and everything else real."""

    def move(module: nn.Module, name: str, parameter: Any) -> Any:
        if not isinstance(parameter, nn.Parameter):
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def differentiate(loss: Tensor) -> None:
    """``loss.backward()`` with function modes left in force.

    ``Tensor.backward`` and ``torch.autograd.backward`` are themselves handed to a function mode, so
    the mode does not see what happens inside them, such as recomputation.
    """
    Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True
    )


class DefiniteSizes(TorchDispatchMode):
    """Gives the results of data-dependent operations on fake tensors a definite size or value.

    A scalar is true or 1. A mask selects as many elements as the rule in force says, by default all
    of them. Non-maximum suppression keeps every box; ``unique`` finds a single value. Operations on
    real tensors alone, such as image sizes and ground-truth boxes, are executed.

    Enter it within ``FakeTensorMode(allow_non_fake_inputs=True)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rule: Rule = Tensor.numel

    @contextmanager
    def within(self, rule: Rule) -> Iterator[None]:
        """Let the masks that are evaluated inside follow a rule, up to their size."""
        outer, self._rule = self._rule, rule
        try:
            yield
        finally:
            self._rule = outer

    def during(self, owner: Any, method: str, rule: Rule) -> None:
        """Let a rule apply during every call of a method of one object, from now on."""
        inner = getattr(owner, method)

        @wraps(inner, assigned=())  # keeps the attributes of a callable object
        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.within(rule):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)

    @staticmethod
    def even(count: int) -> Rule:
        """A rule for ``count`` masks in turn, which split the elements evenly between them."""
        turn = itertools.cycle(range(count))

        def rule(mask: Tensor) -> int:
            i, size = next(turn), mask.numel()
            return size * (i + 1) // count - size * i // count

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
            return args[0].new_empty(self._count(args[1]))
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

    def _count(self, mask: Tensor) -> int:
        return min(mask.numel(), self._rule(mask))

    def _nonzero(self, mask: Tensor) -> Tensor:
        return mask.new_empty((self._count(mask), mask.dim()), dtype=torch.int64)

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
    # In this order, because reading a tensor's attribute is slow within a function mode.
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class CudaAutocast(TorchFunctionMode):
    """Within autocast, computes in float32 what a GPU's autocast does and a CPU's does not.

    The mode sees calls of torch functions and methods but not the operations inside them, so that a
    composite function is listed by its own name. Recomputation in a backward is only seen if
    ``differentiate`` runs it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _FLOAT32 or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if name in _SOFTMAX and args[0].dtype == torch.float16:
            # The kernel reads half precision and writes single, without a copy in between.
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
# The operations that detectors call, from "CUDA Ops that can autocast to float32" of
# https://docs.pytorch.org/docs/stable/amp.html.
_FLOAT32 = _WITH_DTYPE | {
    *("layer_norm", "group_norm", "pow", "__pow__", "exp", "log", "rsqrt", "reciprocal", "norm"),
    *("binary_cross_entropy_with_logits", "cross_entropy", "nll_loss"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "kl_div"),
}


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
