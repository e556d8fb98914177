"""projects/memory_benchmark without Detectron2: its file, its tables, its pictures."""

import json
from pathlib import Path

import pytest
import torch

from dr2net_d2.core.attention_kernels import KERNELS
from dr2net_d2.errors import ConfigError
from projects.memory_benchmark import kernels, pictures, report, store

PROJECTS = Path(__file__).parents[1] / "projects"
SETTING = {"device": "x86_64", "cores": 2, "threads": 2, "python": "3.11", "torch": "2.14"}


@pytest.fixture
def scripts():
    return store, report, pictures


def row(work, arm, saved, peak, seconds=(), **further):
    return {
        **work._asdict(),
        "arm": arm,
        "status": "measured",
        "saved_bytes": saved,
        "peak_bytes": peak,
        "forward_seconds": [second / 4 for second in seconds],
        "backward_seconds": [second * 3 / 4 for second in seconds],
        **further,
    }


@pytest.fixture
def folder(tmp_path, scripts):
    """Two stories written by hand: a CPU's measurements and a prediction, no GPU's."""
    store, _, _ = scripts
    work = store.Work("detector", "b", None, 1024, 1, "fp32", 20, 0)
    half = work._replace(precision="bf16")
    measured = [
        row(work, "stock", 7.6e9, 8.1e9, (40, 80, 20)),
        # The second turn was disturbed, for both.
        row(work, "dr2net-exact", 0.9e9, 1.25e9, (44, 96, 21)),
        {**row(work, "stock-checkpoint", 0, 0), "status": "out of memory", "message": "too large"},
        row(work._replace(size=512), "stock", 1e9, 2e9, (4, 4)),
    ]
    predicted = [{**row(half, "dr2net-exact", 0.5e9, 0.75e9), "status": "predicted"}]
    lean = [
        row(work, "dr2net-stock-heads", 3e9, 4e9, (10, 30, 20)),
        row(work, "dr2net-lean-rpn", 2e9, 3e9, (11, 33, 20)),
    ]
    files = {"results-cpu": measured, "predictions": predicted, "lean-cpu": lean}
    for name, rows in files.items():
        content = {"setting": SETTING, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def cells(page, first):
    """What stands right of a table's first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    (found,) = [line[1:] for line in lines if line[0] == first]
    return found


def test_the_ladder_has_a_row_per_technique(scripts, folder):
    _, report, _ = scripts
    page = folder / "top.md"
    page.write_text("before\n<!-- memory ladder -->\nold\n<!-- /memory ladder -->\nafter\n")
    report.fill_ladder(page, report.Measurements(folder))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    nothing = ["not measured", "not measured"]
    assert cells(text, "stock") == ["7.60 / 8.10", "1.00 x", *nothing, "-"]
    assert cells(text, "stock + checkpoint")[:2] == ["out of memory", "not measured"]
    assert cells(text, "dr2net exact") == ["0.90 / 1.25", "1.10 x", *nothing, "0.50 / 0.75"]
    assert "CPU: 2 threads of x86_64, torch 2.14. GPU: not measured." in text
    report.fill_ladder(page, report.Measurements(folder))
    assert page.read_text() == text


def test_the_projects_page_is_filled(scripts, folder):
    _, report, pictures = scripts
    page = folder / "README.md"
    page.write_text((PROJECTS / "memory_benchmark" / "README.md").read_text())
    found = report.Measurements(folder)
    report.fill_report(page, found)
    text = page.read_text()
    assert "ViT-B, Mask R-CNN, 1024 px, bf16, batch 1" in text
    assert "not measured<br>*predicted 0.50 / 0.75*" in text
    assert "44 s (11 + 33), 0.0227/s, 1.10 x" in text
    lines = [line.split("|")[2:6] for line in text.splitlines() if line.startswith("| ViT")]
    lines = [[cell.strip() for cell in line] for line in lines]
    assert ["none", "3.00 / 4.00", "20 s", "1.00 x"] in lines
    assert ["rpn", "2.00 / 3.00", "20 s", "1.10 x"] in lines
    assert ["pyramid, rpn, roi", *["not measured"] * 3] in lines
    pictures.draw_memory(found, folder / "memory.png")
    pictures.draw_time(found, folder / "time.png")
    assert (folder / "memory.png").read_bytes()[:4] == (folder / "time.png").read_bytes()[:4]


def test_the_pages_are_those_of_the_committed_results(scripts, tmp_path):
    _, report, _ = scripts
    found, copy = report.Measurements(), tmp_path / "README.md"
    for page, fill in (
        (PROJECTS / "memory_benchmark" / "README.md", report.fill_report),
        (PROJECTS.parent / "README.md", report.fill_ladder),
    ):
        copy.write_text(page.read_text())
        fill(copy, found)
        assert copy.read_text() == page.read_text()


def test_pages_without_markers_are_refused(scripts, folder):
    _, report, _ = scripts
    page = folder / "top.md"
    with pytest.raises(ConfigError, match="does not exist"):
        report.fill_ladder(page, report.Measurements(folder))
    page.write_text("<!-- memory ladder -->")
    with pytest.raises(ConfigError, match=r"lacks .* put both"):
        report.fill_ladder(page, report.Measurements(folder))


def test_a_file_is_of_one_setting(scripts, folder):
    store, _, _ = scripts
    path = folder / "results-cpu.json"
    with pytest.raises(ConfigError, match=r"threads 2, now 1; choose another --output"):
        store.Results(path, {**SETTING, "threads": 1})
    path.write_text("[")
    with pytest.raises(ConfigError, match="not a file of measurements"):
        store.Results(path, SETTING)


def test_every_row_is_written_at_once_and_a_failure_is_forgotten(scripts, tmp_path):
    store, _, _ = scripts
    path = tmp_path / "results.json"
    results = store.Results(path, SETTING)
    work = store.Work("vit", "ti", 12, 512, 2, "bf16", 20, 0)
    results.put(work, "stock", status="failed", message="why")
    assert store.Results(path).find(work, "stock")["message"] == "why"
    results.put(work, "stock", status="measured", saved_bytes=1)
    (found,) = store.Results(path, SETTING).rows
    assert found == {**work._asdict(), "arm": "stock", "status": "measured", "saved_bytes": 1}
    assert list(store.Results(path).works()) == [work]
    assert not list(tmp_path.glob("*.partial"))


def test_every_way_of_attention_is_measured_against_the_formula(tmp_path):
    device, shape = torch.device("cpu"), kernels.Shape("small", 2, 6)
    rows = kernels.measure(shape, device, torch.float32, rounds=2)
    assert [row["kernel"] for row in rows if row["chosen"]] == ["chunked"]
    assert all(0 < row["error"] < 1e-5 for row in rows)
    stock, *others = rows
    assert stock["kernel"] == "matrix"
    assert all(row["saved_bytes"] < stock["saved_bytes"] for row in others)
    content = {"setting": SETTING, "rows": [*rows, {**stock, "name": "large"}]}
    for key in ("peak_bytes", "chosen"):
        del content["rows"][-1][key]
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text((PROJECTS / "memory_benchmark" / "README.md").read_text())
    kernels.write_tables(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("| **chunked** |") == 1 and "1.00 x" in text
    assert "large, float32" in text and "out of memory" in text and "GPU: not measured." in text

    inputs = kernels.make_inputs(shape, device, torch.float32)[:3]
    with torch.no_grad():  # it has no backward on a CPU
        flex, matrix = (way(*inputs) for way in (kernels.flexible_attention, KERNELS["matrix"]))
    torch.testing.assert_close(flex, matrix, rtol=1e-5, atol=1e-5)
