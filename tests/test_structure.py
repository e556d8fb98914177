"""The picture of the wings shows the package as it is."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def structure(monkeypatch):
    pytest.importorskip("grimp")
    pytest.importorskip("tomllib")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import structure

    yield structure
    del sys.modules["structure"]


def test_the_picture_is_that_of_the_imports(structure):
    assert structure.PICTURE.read_text() == structure.picture()


def test_every_wing_is_in_it(structure):
    package = ROOT / "dr2net_d2"
    wings = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    wings |= {path.stem for path in package.glob("*.py")} - {"__init__"}
    drawn = re.findall(r'class="name">(\w+)<', structure.PICTURE.read_text())
    assert sorted(drawn) == sorted(wings)


def test_arrows_that_follow_from_others_are_left_out(structure):
    arrows = {("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}
    assert structure.without_consequences(arrows) == arrows - {("a", "c")}
