"""Counting the memory of training: bytes saved for the backward, bytes of tensors, of a device."""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class SavedBytes:
    """Storages that autograd saved, without the excluded ones: address -> bytes."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def count_saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what autograd saves in the context; deterministic, on any device, real or fake.

    Args:
        exclude: tensors that exist anyway, such as parameters; neither they nor views of them are
            counted.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    counted = SavedBytes()
    # Keeps the counted storages alive: the address of a freed one could be used again.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            counted.storages[storage._cdata] = storage.nbytes()
            held.append(tensor.detach())
        # The result of an op that saves it would otherwise refer to itself and never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted


class LiveBytes:
    """Bytes of the storages that are followed: now, at their peak, and by label.

    Args:
        lasting: labels that ``beyond`` leaves out.

    Attributes:
        now, peak: in bytes.
        beyond: peak, in bytes, of the storages whose labels are not ``lasting``; it may occur at
            another moment than ``peak``.
        label: given to new storages; see ``labelled``.
        parts: label -> bytes now.
        peak_parts: label -> bytes at the (first) peak; they sum to it.
    """

    def __init__(self, lasting: Iterable[str] = ()) -> None:
        self.now = self.peak = self.beyond = 0
        self.label = ""
        self.parts: dict[str, int] = {}
        self.peak_parts: dict[str, int] = {}
        self._lasting = frozenset(lasting)
        self._storages: dict[int, tuple[str, int]] = {}  # storage -> its label, its bytes

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Give storages that are created in the context a label; may be nested."""
        outer, self.label = self.label, label
        try:
            yield
        finally:
            self.label = outer

    def assign(self, tensors: Iterable[Tensor], label: str) -> None:
        """Give storages another label; those that existed before are followed from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in self._storages:
                old, size = self._storages[key]
                if old == label:
                    continue
                self._count(old, -size)
                self._storages[key] = label, size
                self._count(label, size)
            else:
                self._follow(storage, label)
        self._observe()

    def _created(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._follow(storage, self.label)
            self._observe()

    def _seen(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        label, size = self._storages.get(storage._cdata, ("", -1))
        if size >= 0 and (resized := storage.nbytes()) != size:  # in place
            self._storages[storage._cdata] = label, resized
            self._count(label, resized - size)
            self._observe()

    def _follow(self, storage: torch.UntypedStorage, label: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        weakref.finalize(storage, self._freed, key).atexit = False
        self._storages[key] = label, size
        self._count(label, size)

    def _freed(self, key: int) -> None:
        label, size = self._storages.pop(key)
        self._count(label, -size)

    def _count(self, label: str, extra: int) -> None:
        self.now += extra
        self.parts[label] = self.parts.get(label, 0) + extra

    def _observe(self) -> None:
        if self.now > self.peak:
            self.peak, self.peak_parts = self.now, dict(self.parts)
        lasting = sum(self.parts.get(label, 0) for label in self._lasting)
        self.beyond = max(self.beyond, self.now - lasting)


_counting: ContextVar[LiveBytes | None] = ContextVar("counting", default=None)


@contextmanager
def peak_tensor_bytes(lasting: Iterable[str] = ()) -> Iterator[LiveBytes]:
    """Follow every storage that an op creates until it is freed; deterministic, on any device.

    A storage counts once, however many views it has. What existed before does not count unless it
    is assigned to a label, nor does what ops allocate and free inside. Autograd's ops count as
    well. Under ``FakeTensorMode``, to be entered first, it gives the peak of a computation without
    doing it.

    Args:
        lasting: see ``LiveBytes``.
    """
    live = LiveBytes(lasting)
    token = _counting.set(live)
    try:
        with _StorageFollower(live):
            yield live
    finally:
        _counting.reset(token)


def labelled(label: str) -> AbstractContextManager[None]:
    """``LiveBytes.labelled`` of the innermost ``peak_tensor_bytes``; nothing if there is none.

    For code that knows what its tensors are. Autograd's thread for a GPU is not reached.
    """
    live = _counting.get()
    return nullcontext() if live is None else live.labelled(label)


def assign(tensors: Iterable[Tensor], label: str) -> None:
    """``LiveBytes.assign`` of the innermost ``peak_tensor_bytes``; nothing if there is none."""
    live = _counting.get()
    if live is not None:
        live.assign(tensors, label)


class _StorageFollower(TorchDispatchMode):
    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            if tensor.untyped_storage()._cdata in inputs:
                self._live._seen(tensor)
            else:
                self._live._created(tensor)
        return out


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or results of an op; several times faster than a pytree."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from tensors_in(branch)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: allocated on a CUDA device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a CUDA device, or on this machine.

    On Linux the limit of a container (cgroup v2) counts too.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Torch's cache is free for tensors.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        # Not every system reports free pages; half of all pages is a careful guess.
        reported = "SC_AVPHYS_PAGES" in os.sysconf_names
        name, share = ("SC_AVPHYS_PAGES", 1) if reported else ("SC_PHYS_PAGES", 2)
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (maximum := limit.read_text().strip()).isdigit():
        free = min(free, int(maximum) - int((group / "memory.current").read_text()))
    return free
