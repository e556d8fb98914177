"""Exported backbones in torch.export and onnxruntime against the network that they came from."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from dr2net_d2 import export
from dr2net_d2.commands import load_config
from dr2net_d2.config.torchvision import check_config
from dr2net_d2.core import Dr2NetViT, SimpleFeaturePyramid
from dr2net_d2.tv.model import build_model

QUICKSTART = str(Path(__file__).parents[1] / "configs/quickstart.yaml")
SMALL = [
    *("MODEL.VIT.DEPTH", "2", "MODEL.VIT.WINDOW_BLOCK_INDEXES", "[0]"),
    *("MODEL.VIT.USE_REL_POS", "True", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def network(beta, depth=2):
    """Relative positions, windows that do not divide 4 x 6 tokens, another pretraining size."""
    torch.manual_seed(0)
    vit = Dr2NetViT(
        **{"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": depth, "num_heads": 4},
        **{"use_rel_pos": True, "rel_pos_zero_init": False, "pretrain_img_size": 48},
        **{"window_size": 3, "window_block_indexes": [0]},
    )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    vit.coefficients.set(1 - beta, beta)
    return SimpleFeaturePyramid(vit, 16, lean=True).eval()


def run_file(path, image):
    """{level: array} of an exported file."""
    if path.suffix == ".pt2":
        return {k: x.detach().numpy() for k, x in torch.export.load(path).module()(image).items()}
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    assert [given.name for given in session.get_inputs()] == ["image"]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, level in expected.items():
        np.testing.assert_allclose(found[name], level.detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("suffix", "beta"), [(".pt2", 0.5), (".onnx", 0), (".onnx", 0.5)])
def test_the_file_computes_what_the_network_does(suffix, beta):
    net, path = network(beta), Path(f"backbone{suffix}")
    difference = export.export(net, torch.randn(1, 3, 64, 96), path)
    assert 0 <= difference < 1e-5
    other = torch.randn(1, 3, 64, 96)
    expected = net(other)
    assert list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    found = run_file(path, other)
    assert_close(found, expected)
    assert [file.name for file in Path().iterdir()] == [path.name]
    # The coefficients are part of it: those of another time give other features.
    net.net.coefficients.set(1, 0.25)
    assert np.abs(found["p4"] - net(other)["p4"].detach().numpy()).max() > 0.01
    assert {part.kernel for part in net.modules() if hasattr(part, "kernel")} == {"auto"}


def test_weights_beside_a_large_onnx_file_come_along(monkeypatch):
    """As torch writes them beyond 2 GB."""
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True)
    )
    net, image = network(0.5, depth=1), torch.randn(1, 3, 32, 32)
    export.export(net, image, Path("large.onnx"))
    assert sorted(file.name for file in Path().iterdir()) == ["large.onnx", "large.onnx.data"]
    assert_close(run_file(Path("large.onnx"), image), net(image))


def test_a_file_that_computes_something_else_is_not_written(monkeypatch):
    net, path = network(0.5, depth=1), Path("backbone.pt2")
    path.write_text("an older one")
    exportable = export.exportable

    def wrong(net):
        copy = exportable(net)
        copy.net.coefficients.set(1, 0)
        return copy

    monkeypatch.setattr(export, "exportable", wrong)
    with pytest.raises(FloatingPointError, match=r"off, relative .*backbone.pt2 has not been"):
        export.export(net, torch.randn(1, 3, 32, 32), path)
    assert path.read_text() == "an older one"
    assert len(list(Path().iterdir())) == 1


def command(output, *words, options=()):
    given = ["--config-file", QUICKSTART, "--engine", "torchvision", "--output", output]
    return export.main([*given, *options, *SMALL, *words])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The checkpoint of a detector at beta 1/2, and its backbone."""
    cfg = load_config(QUICKSTART, SMALL, "torchvision")
    check_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    model.backbone.net.coefficients.set(0.5, 0.5)
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path), model.backbone


def test_the_command_exports_a_trained_detector_for_use_without_this_package(weights, capsys):
    path, backbone = weights
    assert command("b.pt2", "MODEL.WEIGHTS", path, options=["--image-size", "128", "64"]) == 0
    assert "largest difference to the detector's own features" in capsys.readouterr().out
    image = torch.randn(1, 3, 128, 64)
    torch.save(image, "image.pth")
    script = (
        "import sys, torch; image = torch.load('image.pth'); "
        "torch.save(torch.export.load('b.pt2').module()(image), 'out.pth'); "
        "sys.exit('dr2net_d2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    found = {name: level.detach().numpy() for name, level in torch.load("out.pth").items()}
    assert_close(found, backbone(image))


@pytest.mark.parametrize(
    ("output", "options", "words", "message"),
    [
        ("b.pth", (), (), "--output is 'b.pth'; it must end in .pt2 or .onnx"),
        ("b.pt2", (), ("MODEL.WEIGHTS", ""), "MODEL.WEIGHTS is empty"),
        ("b.pt2", (), ("MODEL.WEIGHTS", "dr2net_d2://micro_vit"), "a trained detector"),
        ("b.pt2", (), ("MODEL.DEVICE", "gpu"), "MODEL.DEVICE is 'gpu'"),
        ("b.pt2", ("--image-size", "64", "60"), (), "is 64 60; both must be multiples of 8 px"),
    ],
)
def test_what_cannot_be_exported_is_one_line(weights, output, options, words, message, capsys):
    words = ("MODEL.WEIGHTS", weights[0], *words)
    assert command(output, *words, options=options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dr2net_d2.export: error: ")
    assert re.search(message, last)
    assert list(Path().iterdir()) == []


def test_missing_packages_are_named_or_the_check_left_out(weights, monkeypatch, capsys, caplog):
    words = ("MODEL.WEIGHTS", weights[0])
    options = ["--image-size", "32", "32"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxscript", None)
        assert command("b.onnx", *words, options=options) == 2
    assert "ONNX needs onnxscript; install the extra" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert command("b.onnx", *words, options=options) == 0
    assert "b.onnx was not checked: onnxruntime is not installed" in caplog.text
    assert Path("b.onnx").is_file()
