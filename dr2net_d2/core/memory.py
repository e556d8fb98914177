"""Memory of training, counted: bytes saved for backward, bytes of tensors, memory of a device."""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class SavedBytes:
    """Bytes of the distinct storages that autograd saved, without the excluded ones."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def count_saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what a forward keeps for its backward; deterministic, on any device, real or fake.

    Args:
        exclude: tensors that live anyway, such as parameters; views of them are not counted.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    counted = SavedBytes()
    # Holds what was counted, so that no storage is freed and its address used again.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            counted.storages[storage._cdata] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted


@dataclass
class LiveBytes:
    """Bytes of the tensors that ops have created and that still live, and their highest sum."""

    now: int = 0
    peak: int = 0


@contextmanager
def peak_tensor_bytes() -> Iterator[LiveBytes]:
    """Follow every storage that an op creates until it is freed; deterministic, on any device.

    A storage counts once, however many views it has; what lived before does not count, nor does
    what ops allocate and free inside. Autograd's ops count as well. Under ``FakeTensorMode``, to be
    entered first, it tells the peak of a computation without doing it.
    """
    counted = LiveBytes()
    with _StorageFollower(counted):
        yield counted


class _StorageFollower(TorchDispatchMode):
    def __init__(self, counted: LiveBytes) -> None:
        super().__init__()
        self._counted = counted
        self._sizes: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes and key not in given:
                weakref.finalize(storage, self._freed, key).atexit = False
                self._grow(key, storage.nbytes())
            elif key in self._sizes and storage.nbytes() != self._sizes[key]:  # resized in place
                self._grow(key, storage.nbytes() - self._sizes[key])
        return out

    def _grow(self, key: int, extra: int) -> None:
        self._sizes[key] = self._sizes.get(key, 0) + extra
        self._counted.now += extra
        self._counted.peak = max(self._counted.peak, self._counted.now)

    def _freed(self, key: int) -> None:
        self._counted.now -= self._sizes.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate: free ones of a CUDA device, or of the machine.

    On Linux the limit of a container (cgroup v2) counts too.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps cached is free for tensors.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        # Free pages are not told by every system; half of all is a careful guess then.
        told = "SC_AVPHYS_PAGES" in os.sysconf_names
        name, share = ("SC_AVPHYS_PAGES", 1) if told else ("SC_PHYS_PAGES", 2)
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (maximum := limit.read_text().strip()).isdigit():
        free = min(free, int(maximum) - int((group / "memory.current").read_text()))
    return free
