"""Weight files: PyTorch's, safetensors, and the NumPy pickles of Detectron2's model zoo.

Reading never runs code from a file. Writing leaves either the old file or the complete new one.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dr2net_d2.errors import WeightsError

CONTAINERS = ("model", "state_dict", "teacher", "model_state", "blobs")
"""Keys under which checkpoints have their weights, in order of precedence."""


class _Dtype:
    """``numpy.dtype`` in a pickle; only numbers, as others could make NumPy misread its memory."""

    def __init__(self, code: str, *_: Any) -> None:
        self.numpy = np.dtype(code)
        if self.numpy.kind not in "biufc":
            raise pickle.UnpicklingError(f"arrays of {self.numpy} are not weights")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """``numpy.ndarray`` in a pickle, which sets ``value`` after the construction."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # a str if Python 2 wrote it
    values = np.frombuffer(raw, dtype.numpy).reshape(shape, order=order)
    return values.astype(dtype.numpy.newbyteorder("="))


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return _from_buffer(raw, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


HARMLESS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    # "core" in NumPy 1, "_core" in NumPy 2.
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
"""Names that a pickle may use -> what they stand for. These are plain data, and the arguments of a
training, which MAE, DeiT and timm save with their weights."""


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return HARMLESS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not data") from None


def _read_pickle(path: str) -> Any:
    with open(path, "rb") as file:
        return _DataUnpickler(file, encoding="latin1").load()


def _read_torch(path: str) -> Any:
    harmless: list[Any] = [(thing, name) for name, thing in HARMLESS.items()]
    with torch.serialization.safe_globals(harmless):
        return torch.load(path, map_location="cpu", weights_only=True)


def _write_pickle(state: dict[str, Tensor], path: Path) -> None:
    arrays = {
        # NumPy has no bfloat16.
        key: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
        for key, tensor in state.items()
    }
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "dr2net_d2"}))


READERS: dict[str, Callable[[str], Any]] = {
    ".pkl": _read_pickle,
    ".safetensors": safetensors.torch.load_file,
}
"""Suffix -> reader; a file with any other suffix is read as PyTorch's."""

WRITERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    ".pth": lambda state, path: torch.save({"model": state}, path),
    ".pkl": _write_pickle,
    ".safetensors": safetensors.torch.save_file,
}
"""Suffix -> writer."""


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a weight file.

    Returns:
        A dict with the weights, name -> tensor, under "model", and everything else in the file.

    Raises:
        WeightsError: the file is empty or damaged, has another format, would run code, or has no
            tensors.
    """
    if Path(path).stat().st_size == 0:
        raise WeightsError(f"weights {path!r} are an empty file; download it again")
    try:
        content = READERS.get(Path(path).suffix, _read_torch)(path)
    except Exception as error:  # whatever the format's reader raises on a damaged file
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise WeightsError(
                f"weights {path!r} are refused: loading them would call {refused[1]}, which "
                "weights do not need; nothing has been run"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"weights {path!r} cannot be read: cut off, or not in the format that the suffix names "
            f"({reason}); download them again"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"weights {path!r} hold a {type(content).__name__}; a checkpoint is a dict of tensors"
        )
    for container in CONTAINERS:
        if isinstance(content.get(container), Mapping):
            rest = {key: value for key, value in content.items() if key != container}
            return {"model": _tensors(path, content[container]), **rest}
    return {"model": _tensors(path, content)}


def check_output(path: str) -> None:
    """Check a path for ``write_weights`` before any work is done.

    Raises:
        WeightsError: the suffix is not in ``WRITERS``, or the folder does not exist.
    """
    if Path(path).suffix not in WRITERS:
        raise WeightsError(f"output {path!r} must end with one of {', '.join(WRITERS)}")
    if not Path(path).parent.is_dir():
        folder = str(Path(path).parent)
        raise WeightsError(f"output {path!r}: there is no folder {folder!r}; make it first")


def write_weights(state: Mapping[str, Tensor], path: str) -> None:
    """Write weights in the format that the suffix names; an older file is replaced at the end.

    Args:
        state: name -> tensor.
        path: ends with a suffix in ``WRITERS``. A .pkl has NumPy arrays, as in Detectron2's zoo.

    Raises:
        WeightsError: as for ``check_output``, or the file cannot be written.
    """
    check_output(path)
    target = Path(path)
    write = WRITERS[target.suffix]
    partial = target.with_name(f"{target.name}.partial")
    try:
        write({key: _packed(tensor) for key, tensor in state.items()}, partial)
        partial.replace(target)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{path!r} cannot be written ({error}); choose another path") from error


def _packed(tensor: Tensor) -> Tensor:
    """A copy with its own storage: safetensors requires it, and it makes files smaller."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _tensors(path: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state with NumPy arrays turned into tensors."""
    tensors = {}
    for key, value in state.items():
        array = value.value if isinstance(value, _Array) else value
        tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        if not isinstance(tensor, Tensor):
            raise WeightsError(
                f"weights {path!r} hold a {type(value).__name__} as {key!r}; a checkpoint is a "
                "dict of tensors"
            )
        tensors[key] = tensor
    if not tensors:
        raise WeightsError(f"weights {path!r} hold no tensors; give another file")
    return tensors
