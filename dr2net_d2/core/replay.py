"""Calling a residual function again exactly as it was called before.

Besides its input, a function depends on random generators, its buffers and the autocast state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """False for fake and meta tensors, which have a shape but no data."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def rng_state(device: torch.device) -> tuple[Tensor, ...]:
    """States of the generators that a function on ``device`` draws from.

    Empty under FakeTensorMode, where nothing is drawn.
    """
    if detect_fake_mode() is not None:
        return ()
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def set_rng_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Set the generators to what ``rng_state`` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class Surroundings:
    """The random generators of a device and some buffers, as they were at one moment.

    Args:
        device: the one whose generators are meant.
        rng: states of the generators; empty to leave them alone.
        buffers: tensors that a function may change in place.
        values: copies of the buffers, one for each.
    """

    def __init__(
        self,
        device: torch.device,
        rng: Sequence[Tensor] = (),
        buffers: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
    ) -> None:
        self._device = device
        self.rng = tuple(rng)
        self.buffers = list(buffers)
        self.values = list(values)
        self._versions = [buffer._version for buffer in buffers]

    @classmethod
    def now(cls, device: torch.device, buffers: Sequence[Tensor]) -> Surroundings:
        """A copy of the present state."""
        return cls(device, rng_state(device), buffers, [buffer.clone() for buffer in buffers])

    @classmethod
    def of_tensors(
        cls, device: torch.device, buffers: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> Surroundings:
        """The inverse of ``tensors``."""
        states = len(tensors) - len(buffers)
        return cls(device, tensors[:states], buffers, tensors[states:])

    def tensors(self) -> list[Tensor]:
        """States of the generators and values of the buffers, to be saved for a backward."""
        return [*self.rng, *self.values]

    def changed(self) -> Surroundings:
        """Those of the generators and buffers that have changed since; does not wait for a GPU."""
        drew = not all(map(torch.equal, self.rng, rng_state(self._device)))
        # All buffers or none: batch_norm writes its statistics past the version counter.
        moved = [buffer._version for buffer in self.buffers] != self._versions
        return Surroundings(
            self._device,
            self.rng if drew else (),
            self.buffers if moved else (),
            self.values if moved else (),
        )

    def restore(self) -> None:
        """Set generators and buffers back."""
        if self.rng:
            set_rng_state(self._device, self.rng)
        with torch.no_grad():
            for buffer, value in zip(self.buffers, self.values, strict=True):
                buffer.copy_(value)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context in which these surroundings hold; afterwards everything is as it was before."""
        if not (self.rng or self.buffers):
            yield
            return
        outer = Surroundings.now(self._device, self.buffers)
        self.restore()
        try:
            yield
        finally:
            outer.restore()


class AutocastState:
    """The autocast state of a device at construction, to be entered again later.

    Entered without the weight cache, which would hold 2 bytes a parameter until the region ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.enabled = _autocasts(device)
        self._dtype = torch.get_autocast_dtype(device.type) if self.enabled else None

    def __call__(self) -> AbstractContextManager[object]:
        if not self.enabled and not _autocasts(self._device):
            return nullcontext()
        return torch.autocast(
            self._device.type, dtype=self._dtype, enabled=self.enabled, cache_enabled=False
        )


def _autocasts(device: torch.device) -> bool:
    # There is no autocast for meta tensors.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
