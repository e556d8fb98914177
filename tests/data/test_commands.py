"""The commands of ``python -m dr2net_d2.data``, their numbers counted by hand."""

import json

import cv2
import numpy as np
import pytest

from dr2net_d2.data.coco import CocoDataset, CocoRecord
from dr2net_d2.data.commands import main
from dr2net_d2.data.contact_sheet import _HATCH, choose, contact_sheet, label_colour
from dr2net_d2.data.formats import FORMATS, BadEntries
from dr2net_d2.data.inspection import describe, report


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path / "cache"))
    return tmp_path


def record(image_id, sides=(), ignored=(), regions=(), file="", size=200):
    sides = [*sides, *ignored]
    boxes = np.array([[5, 5, 5 + w, 5 + h] for w, h in sides], np.float32).reshape(-1, 4)
    labels = np.arange(len(sides)) % 2
    crowd = np.arange(len(sides)) >= len(sides) - len(ignored)
    regions = np.array(regions, np.float32).reshape(-1, 4)
    return CocoRecord(file, image_id, size, 2 * size, boxes, labels, crowd, regions)


def test_statistics_by_hand():
    records = (
        record(1, [(4, 4), (8, 8), (2, 32), (16, 16), (31, 31)], ignored=[(9, 9)]),
        record(2),
        record(3, [(32, 32), (96, 96), (500, 300)], regions=[[0, 0, 9, 9]], size=100),
    )
    bad = BadEntries()
    bad.add(__import__("pathlib").Path("a.txt"), 3, "is wrong")
    facts = describe(CocoDataset(("cat", "dog"), (1, 2), records, 4), bad)
    assert facts["images"] == 3 and facts["images_without_objects"] == 1
    assert facts["boxes"] == 8 and facts["ignored_boxes"] == 1 and facts["ignore_regions"] == 1
    assert facts["empty_boxes_left_out"] == 4
    assert facts["classes"] == {
        "cat": {"boxes": 5, "ignored": 0},
        "dog": {"boxes": 3, "ignored": 1},
    }
    assert facts["objects_per_image"] == {"min": 0, "median": 3, "max": 5}
    assert facts["bins"]["AI-TOD"] == {"very tiny": 1, "tiny": 2, "small": 2, "medium": 3}
    assert facts["bins"]["COCO"] == {"small": 5, "medium": 1, "large": 2}
    counts = {entry["from"]: entry["boxes"] for entry in facts["histogram"] if entry["boxes"]}
    assert counts == {4: 1, 8: 2, 16: 1, 24: 1, 32: 1, 96: 1, 256: 1}
    assert facts["side"]["max"] == 387.3 and facts["side"]["median"] == 23.5
    assert facts["image_width"] == {"min": 200, "median": 400, "max": 400}
    text = report(facts)
    for words in ("images          3, 1 of them", "8-12 px         2", "a.txt:3: is wrong"):
        assert words in text
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_statistics_of_nothing():
    facts = describe(CocoDataset(("cat",), (1,), (record(1),), 0), BadEntries())
    assert facts["boxes"] == 0 and facts["side"]["mean"] is None
    assert "boxes           0, 0 to 0" in report(facts)


def test_inspect_a_folder_a_json_and_a_name(capsys):
    assert main(["sample", "visdrone", "drone"]) == 0
    assert main(["convert", "drone", "out/drone.json"]) == 0
    capsys.readouterr()
    found = {}
    for source in ("drone", "out/drone.json", "small_digits_val_n2_s64_d3"):
        assert main(["inspect", source, "--json"]) == 0
        found[source] = json.loads(capsys.readouterr().out)
    assert found["drone"].pop("format") == "visdrone"
    assert found["out/drone.json"].pop("format") == "coco"
    assert found["drone"].pop("source") == "drone" and found["out/drone.json"].pop("source")
    assert found["drone"] == found["out/drone.json"]
    assert found["drone"]["boxes"] == 6 and found["drone"]["ignore_regions"] == 2
    assert found["small_digits_val_n2_s64_d3"]["images"] == 2
    assert main(["inspect", "drone"]) == 0
    assert "pedestrian              2" in capsys.readouterr().out


def test_inspect_lists_bad_entries_and_fails(here, capsys):
    assert main(["sample", "visdrone", "drone"]) == 0
    (here / "drone/VisDrone2019-DET-val/annotations/0000001.txt").write_text("1,2\n3\n")
    assert main(["inspect", "drone"]) == 2
    out, err = capsys.readouterr()
    assert "bad entries     2" in out and "0000001.txt:2: 1 values" in out
    assert "drone: 2 bad entries, the first:" in err.splitlines()[-1]


def test_convert_there_and_to_other_formats(here, capsys):
    assert main(["sample", "voc", "voc"]) == 0
    assert main(["convert", "voc", "a/b/voc.json", "--part", "train"]) == 0
    rows = json.loads((here / "a/b/voc.json").read_text())["images"]
    assert rows[0]["file_name"] == "../../voc/JPEGImages/0000001.jpg"
    for name in sorted({*FORMATS} - {"visdrone", "aitod", "tinyperson", "dota"}):
        assert main(["convert", "a/b/voc.json", f"as_{name}", "--to", name]) == 0
        part = ["--part", "train"] if name in ("yolo", "voc") else []
        assert main(["inspect", f"as_{name}", *part]) == 0
    assert main(["convert", "a/b/voc.json", "as_dota", "--to", "dota"]) == 2
    assert "DOTA 2.0 has no category" in capsys.readouterr().err
    assert not (here / "as_dota").exists()


def test_skip_bad(here, capsys):
    assert main(["sample", "yolo", "yolo"]) == 0
    (here / "yolo/labels/train/day/0000001.txt").write_text("0 9 9 9 9\n0 0.5 0.5 0.1 0.1\n")
    assert main(["convert", "yolo", "y.json", "--part", "val"]) == 2
    assert "leave them out with convert --skip-bad" in capsys.readouterr().err
    assert not (here / "y.json").exists()
    assert main(["convert", "yolo", "y.json", "--part", "val", "--skip-bad"]) == 0
    assert "bad entries     1" in capsys.readouterr().out
    assert len(json.loads((here / "y.json").read_text())["annotations"]) == 7
    assert main(["convert", "yolo", "voc", "--part", "val", "--skip-bad", "--to", "voc"]) == 0
    assert main(["inspect", "voc"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspect", "nothing"], "'nothing' is not known"),
        (["inspect", "nothing.json"], "No such file"),
        (["inspect", "nothing", "--format", "voc"], "no such file or folder"),
        (["convert", "drone", "out"], "must end with .json, or give --to"),
        (["convert", "drone/own.json", "drone/own.json"], "would replace SOURCE"),
        (["convert", "drone", "drone", "--to", "yolo"], "exists already"),
        (["draw", "drone", "out.gif"], "must end with .jpg or .png"),
        (["draw", "drone", "out.png", "--images", "0"], "--images is 0; it must be from 1"),
        (["draw", "drone", "out.png", "--side", "9999"], "--side is 9999"),
        (["draw", "drone", "drone/own.json/out.png"], "cannot be written"),
        (["sample", "voc", "drone"], "exists already; name a new folder"),
        (["sample", "voc", "drone/own.json/voc"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    assert main(["sample", "visdrone", "drone"]) == 0
    assert main(["convert", "drone", "drone/own.json"]) == 0
    capsys.readouterr()
    assert main(words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(error) == 1 and says in error[0]


def test_draw(here):
    assert main(["sample", "visdrone", "drone"]) == 0
    assert main(["draw", "drone", "out/drone.png", "--images", "2", "--side", "200"]) == 0
    assert [path.name for path in (here / "out").iterdir()] == ["drone.png"]
    assert cv2.imread("out/drone.png").shape[1] >= 2 * 200


def test_what_a_contact_sheet_shows(here):
    cv2.imwrite("a.png", np.zeros((100, 200, 3), np.uint8))
    own = record(1, [(20, 10)], ignored=[(60, 40)], regions=[[100, 50, 180, 90]], file="a.png")
    own = CocoRecord(**{**vars(own), "height": 100, "width": 200})
    sheet = contact_sheet(CocoDataset(("cat", "dog"), (1, 2), (own,), 0), 1, 400)
    picture = sheet[8 : 8 + 200, 8 : 8 + 400]  # twice as large, behind a margin
    assert tuple(picture[22, 30]) == (0, 0, 0)
    assert tuple(picture[9, 12]) == label_colour(0)
    assert tuple(picture[90, 40]) == (150, 150, 150)
    region = picture[104:176, 204:356].reshape(-1, 3)
    hatched = (region == _HATCH).all(axis=1).mean()
    assert 0.15 < hatched < 0.25 and (region[~(region == _HATCH).all(axis=1)] == 0).all()
    assert (picture[:100, 150:] == 0).all()


def test_images_are_chosen_over_the_whole_dataset():
    records = [record(i, [(5, 5)] if i % 2 else []) for i in range(20)]
    assert [r.image_id for r in choose(records, 3)] == [1, 9, 19]
    assert len(choose(records, 15)) == 15 and len(choose(records, 50)) == 20
