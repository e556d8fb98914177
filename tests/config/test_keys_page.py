"""docs/keys.md, as docs/hooks.py fills it for the site."""

import importlib.util
from pathlib import Path

import pytest

from dr2net_d2.config.detectron2_keys import HONOURED
from dr2net_d2.config.detectron2_only_keys import DETECTRON2_ONLY
from dr2net_d2.config.keys import DR2NET_KEYS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def rows():
    """First cell of every row of a table -> the other cells."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown((DOCS / "keys.md").read_text())
    assert "<!--" not in page
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len({first for first, *_ in cells}) == len(cells)
    return {first: others for first, *others in cells}


def test_every_key_is_on_the_page(rows):
    names = HONOURED.keys() | DR2NET_KEYS.keys() | DETECTRON2_ONLY.keys()
    assert rows.keys() == {f"`{name}`" for name in names}


def test_rows_are_those_of_the_table(rows):
    assert rows["`MODEL.DR2NET.FIRST_STATE`"][:2] == ["`'copy'`", "'copy' or 'zero'"]
    assert rows["`MODEL.VIT.IMG_SIZE`"][0] == "`1024`"
    assert rows["`SOLVER.ACCUMULATION_STEPS`"][1] == "at least 1; with torchvision 1"
    assert rows["`INPUT.CROP.ENABLED`"] == ["False"]
    assert rows["`INPUT.CROP.SIZE`"] == ["any value"]
