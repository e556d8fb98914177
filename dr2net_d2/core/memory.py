"""Memory of training, counted: bytes saved for backward, peak memory of a device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SavedBytes:
    """Bytes of the distinct storages that autograd saved, without the excluded ones."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def count_saved_bytes(exclude: Iterator[Tensor] | tuple[Tensor, ...] = ()) -> Iterator[SavedBytes]:
    """Count what a forward keeps for its backward; deterministic, on any device.

    Args:
        exclude: tensors that live anyway, such as parameters; views of them are not counted.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    counted = SavedBytes()
    # Holds what was counted, so that no storage is freed and its address used again.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            counted.storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
