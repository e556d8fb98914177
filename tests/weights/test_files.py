"""Reading never runs what a file brings along, and says what is wrong with it; writing is whole."""

import argparse
import collections
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dr2net_d2.errors import WeightsError
from dr2net_d2.weights.files import WRITERS, read_checkpoint, write_weights

STATE = {
    "weight": torch.arange(6.0).view(2, 3),
    "scalar": torch.tensor(0.5, dtype=torch.float64),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(state, expected=STATE):
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_is_written_is_read(suffix):
    Path(f"out{suffix}").write_text("an older file")
    write_weights(STATE, f"out{suffix}")
    assert_same(read_checkpoint(f"out{suffix}")["model"])
    assert os.listdir() == [f"out{suffix}"]


def test_half_precision_goes_to_the_zoos_format_in_single():
    write_weights({"weight": torch.full((2,), 0.5, dtype=torch.bfloat16)}, "out.pkl")
    assert_same(read_checkpoint("out.pkl")["model"], {"weight": torch.full((2,), 0.5)})


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_write_that_is_cut_off_leaves_the_older_file(suffix, monkeypatch):
    path = Path(f"out{suffix}")
    path.write_text("an older file")

    def full(state, partial):
        partial.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setitem(WRITERS, suffix, full)
    with pytest.raises(WeightsError, match="No space left on device"):
        write_weights(STATE, str(path))
    assert path.read_text() == "an older file"
    assert os.listdir() == [path.name]


@pytest.mark.parametrize("container", ["model", "state_dict", "teacher", None])
def test_weights_are_found_beside_other_things(container):
    content = {container: STATE, "epoch": 3} if container else STATE
    torch.save(content, "in.pth")
    checkpoint = read_checkpoint("in.pth")
    assert_same(checkpoint.pop("model"))
    assert checkpoint == ({"epoch": 3} if container else {})


def test_the_arguments_of_a_training_are_data():
    """As MAE, DeiT and timm save them."""
    content = {"model": STATE, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}
    torch.save(content, "in.pth")
    torch.save(content, "old.pth", _use_new_zipfile_serialization=False)
    for name in ("in.pth", "old.pth"):
        checkpoint = read_checkpoint(name)
        assert_same(checkpoint["model"])
        assert checkpoint["args"].lr == 0.1
        assert checkpoint["best"] == 0.5


def numpy_pickle(content, protocol, core):
    """As NumPy 1 (core "numpy.core") and NumPy 2 ("numpy._core") write it."""
    file = io.BytesIO()
    # The one in Python can be told not to count bytes, which other names would change.
    pickler = pickle._Pickler(file, protocol)
    pickler.framer.start_framing = lambda: None
    pickler.dump(content)
    raw, installed = file.getvalue(), np.empty(0).__reduce__()[0].__module__
    for module in ("multiarray", "numeric"):
        old = installed.replace("multiarray", module).encode()
        new = f"{core}.{module}".encode()
        raw = raw.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)
        raw = raw.replace(b"c" + old + b"\n", b"c" + new + b"\n")
    return raw


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_pickles_of_all_versions(protocol, core):
    arrays = collections.OrderedDict((key, value.numpy()) for key, value in STATE.items())
    content = {"model": arrays, "__author__": "Third Party", "iteration": np.int64(7)}
    raw = numpy_pickle(content, protocol, core)
    other = {"numpy.core": b"numpy._core.", "numpy._core": b"numpy.core."}[core]
    assert core.encode() in raw
    assert other not in raw
    Path("in.pkl").write_bytes(raw)
    checkpoint = read_checkpoint("in.pkl")
    assert_same(checkpoint["model"])
    assert (checkpoint["__author__"], checkpoint["iteration"]) == ("Third Party", 7)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["in.pkl", "in.pth", "in.pt"])
@pytest.mark.parametrize("content", [Payload(), {"model": {"a": np.ones(2)}, "x": Payload()}])
def test_a_file_that_would_run_code_is_refused_without_running_it(name, content):
    if name == "in.pkl":
        Path(name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, name)
    with pytest.raises(WeightsError, match=f"refused: .* {os.mkdir.__module__}.mkdir"):
        read_checkpoint(name)
    assert not Path("ran").exists()
    pickle.loads(pickle.dumps(content))
    assert Path("ran").exists()


class Call:
    """Pickles as a call of something harmless with arguments that are not."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        # NumPy takes these bytes for a pointer.
        Call(np.ndarray, (1,), np.dtype(object), b"12345678"),
        Call(np.empty(0).__reduce_ex__(5)[0], b"12345678", np.dtype(object), (1,), "C"),
        Call(np.dtype, "O"),
        np.array(["text"]),
        np.array([None]),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(value):
    Path("in.pkl").write_bytes(pickle.dumps({"model": {"weight": value}}))
    with pytest.raises(WeightsError, match="are not weights"):
        read_checkpoint("in.pkl")


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">i2", "?", "f2"])
def test_byte_orders_and_types(dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]], dtype=dtype)
    Path("in.pkl").write_bytes(pickle.dumps({"model": {"a": array, "b": array.T}}))
    state = read_checkpoint("in.pkl")["model"]
    assert np.array_equal(state["a"].numpy(), array)
    assert np.array_equal(state["b"].numpy(), array.T)
    state["a"].zero_()  # can be written to


def test_pickles_of_python_2():
    """Their bytes are text, as in the Caffe2 models of Detectron2's zoo."""
    raw = np.array([1.5, -2.5], dtype="<f4").tobytes().decode("latin1")
    lines = [
        "(dp0", "S'model'", "p1", "(dp2", "S'weight'", "p3",
        "cnumpy.core.multiarray", "_reconstruct", "p4", "(cnumpy", "ndarray", "p5",
        "(I0", "tp6", "S'b'", "p7", "tp8", "Rp9", "(I1", "(I2", "tp10", "cnumpy", "dtype", "p11",
        "(S'f4'", "p12", "I0", "I1", "tp13", "Rp14",
        "(I3", "S'<'", "p15", "NNNI-1", "I-1", "I0", "tp16", "bI00", f"S{raw!r}", "p17", "tp18",
        "bss.",
    ]  # fmt: skip
    Path("in.pkl").write_bytes("\n".join(lines).encode("latin1"))
    assert read_checkpoint("in.pkl")["model"]["weight"].tolist() == [1.5, -2.5]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.pth", b"", ["empty file"]),
        ("in.pkl", b"", ["empty file"]),
        ("in.safetensors", b"", ["empty file"]),
        ("in.pth", b"<html>not found</html>", ["cannot be read", "download"]),
        ("in.pkl", b"<html>not found</html>", ["cannot be read", "download"]),
        ("in.safetensors", b"<html>not found</html>", ["cannot be read", "download"]),
        ("in.pkl", pickle.dumps([1, 2]), ["hold a list", "dict of tensors"]),
        ("in.pkl", pickle.dumps({}), ["no tensors"]),
        ("in.pkl", pickle.dumps({"model": {"lr": 0.1}}), ["hold a float as 'lr'"]),
    ],
)
def test_what_is_no_checkpoint_is_said(name, content, words):
    Path(name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(name)
    assert [word for word in [repr(name), *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_said_to_be(suffix, share):
    write_weights({"weight": torch.randn(100, 100)}, f"in{suffix}")
    whole = Path(f"in{suffix}").read_bytes()
    Path(f"in{suffix}").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=rf"'in{suffix}' cannot be read: cut off"):
        read_checkpoint(f"in{suffix}")


def test_a_model_saved_as_an_object_is_refused():
    torch.save(torch.nn.Linear(2, 2), "in.pth")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint("in.pth")


@pytest.mark.parametrize("path", ["out.bin", "none/out.pth"])
def test_where_nothing_can_be_written(path):
    with pytest.raises(WeightsError, match=path):
        write_weights(STATE, path)


def test_safetensors_of_others_are_read():
    safetensors.torch.save_file({"weight": torch.ones(2)}, "in.safetensors", {"format": "pt"})
    assert_same(read_checkpoint("in.safetensors")["model"], {"weight": torch.ones(2)})
