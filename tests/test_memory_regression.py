"""Memory of three trainings may not rise unnoticed. Refresh the committed values by

    python -m tests.test_memory_regression

Counted on fake tensors, so the numbers are the same on every machine with the same torch. Lower
values fail as well: a baseline that is left behind would let the next change give the gain back.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from dr2net_d2.commands import load_config
from dr2net_d2.plan.planner import predict

ROOT = Path(__file__).parents[1]
BASELINE = Path(__file__).with_name("memory_baseline.json")
REFRESH = "refresh the baseline by `python -m tests.test_memory_regression` and commit it"
TOLERANCE = 0.02

# Name -> config file, engine, overrides; one image of MODEL.VIT.IMG_SIZE, beta 1/2.
CASES = {
    "quickstart": ("quickstart.yaml", "torchvision", ()),
    "mask_rcnn_vitdet_b": ("COCO-InstanceSegmentation/mask_rcnn_vitdet_b.yaml", "detectron2", ()),
    "mask_rcnn_vitdet_l": ("COCO-InstanceSegmentation/mask_rcnn_vitdet_l.yaml", "detectron2", ()),
}


def measure(name):
    """{"saved": ..., "peak": ..., "parts": {...}} in bytes."""
    file, engine, overrides = CASES[name]
    cfg = load_config(str(ROOT / "configs" / file), overrides, engine)
    side = cfg.MODEL.VIT.IMG_SIZE
    found = predict(cfg, "dr2net", side, coefficients=(0.5, 0.5), engine=engine)
    return {key: dataclasses.asdict(found)[key] for key in ("saved", "peak", "parts")}


def complaint(name, found, expected):
    """What to tell about values that differ by more than the tolerance; "" if none does."""
    told = []
    for key in ("saved", "peak"):
        change = found[key] / expected[key] - 1
        if abs(change) > TOLERANCE:
            told.append(
                f"{name}: {key} bytes {'rose' if change > 0 else 'fell'} by {abs(change):.1%}, "
                f"from {expected[key]:,} to {found[key]:,}"
            )
    if not told:
        return ""
    for part, size in found["parts"].items():
        if size != (before := expected["parts"][part]):
            told.append(f"  {part}: {size - before:+,} bytes, from {before:,} to {size:,}")
    told.append(f"if that is meant, {REFRESH}")
    return "\n".join(told)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_the_baseline(name):
    if CASES[name][1] == "detectron2":
        pytest.importorskip("detectron2")
    told = complaint(name, measure(name), json.loads(BASELINE.read_text())[name])
    assert not told, told


def test_a_complaint_says_what_grew_and_what_to_do():
    before = {"saved": 1000, "peak": 5000, "parts": {"streams": 100, "heads": 4900}}
    assert complaint("x", before, before) == ""
    slightly = {**before, "saved": 1019, "peak": 4901}
    assert complaint("x", slightly, before) == ""
    more = {"saved": 1000, "peak": 5200, "parts": {"streams": 300, "heads": 4900}}
    told = complaint("x", more, before)
    assert "x: peak bytes rose by 4.0%, from 5,000 to 5,200" in told
    assert "streams: +200 bytes, from 100 to 300" in told
    assert "heads" not in told and "saved" not in told and REFRESH in told
    assert "fell by 3.8%" in complaint("x", before, more)


def test_every_case_has_a_baseline():
    assert sorted(json.loads(BASELINE.read_text())) == sorted(CASES)


def main():
    baseline = {name: measure(name) for name in CASES}
    BASELINE.write_text(json.dumps(baseline, indent=2) + "\n")
    sys.stdout.write(f"wrote {BASELINE}\n")


if __name__ == "__main__":
    main()
