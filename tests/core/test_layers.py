"""Arrows of the design: what a layer may import, seen in a fresh interpreter."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("core", ["detectron2", "torchvision", "fvcore", "timm", "cv2", "numpy.testing"]),
        ("data", ["detectron2", "torchvision", "torch", "fvcore"]),
        ("evaluation", ["detectron2", "torchvision", "torch", "fvcore"]),
        ("tv.engine", ["detectron2"]),
    ],
)
def test_imports(package, forbidden):
    code = f"import sys, dr2net_d2.{package}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not set(forbidden) & set(loaded.stdout.split())
