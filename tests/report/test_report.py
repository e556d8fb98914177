"""The command, page and pictures of a report, on detections with errors of every kind."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import markupsafe
import numpy as np
import pytest

from dr2net_d2.data import make_small_digits, register_coco_json, small_digits_from_name
from dr2net_d2.errors import ConfigError
from dr2net_d2.evaluation import choose_protocol, evaluate_boxes
from dr2net_d2.report import __main__ as report
from dr2net_d2.report.charts import CHARTS
from dr2net_d2.report.images import encode
from dr2net_d2.report.scenes import Scene, draw_scene
from dr2net_d2.report.source import Recorded, recorded

NAME = "digits <small> & 'odd'"
CLASSES = ["<b>zero</b>", 'one & "two"', "$3^$", *"3456789"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip


def detections(document):
    """Correct, inaccurate, misclassified, duplicate and misplaced detections, or none."""
    rng = np.random.default_rng(0)
    rows = []
    for row in document["annotations"]:
        x, y, w, h = row["bbox"]
        other = row["category_id"] % 10 + 1
        kinds = rng.choice(6, p=[0.4, 0.15, 0.15, 0.1, 0.1, 0.1])
        for category, box in [
            [(row["category_id"], [x, y, w, h])],
            [(row["category_id"], [x + w / 2, y, w, h])],
            [(other, [x, y, w, h])],
            [(row["category_id"], [x, y, w, h]), (row["category_id"], [x, y, w, 0.9 * h])],
            [(other, [x + w / 2, y, w, h]), (other, [1, 1, 9, 9])],
            [],
        ][kinds]:
            keys = {"image_id": row["image_id"], "category_id": category}
            rows.append({**keys, "bbox": box, "score": float(rng.random())})
    return rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The JSON and the images of a dataset with awkward names, registered as ``NAME``."""
    folder = tmp_path_factory.mktemp("digits")
    path, images = make_small_digits(
        small_digits_from_name("small_digits_val_n6_s128_d8_max40"), folder
    )
    document = json.loads(path.read_text())
    for row, name in zip(document["categories"], CLASSES, strict=True):
        row["name"] = name
    path = folder / "odd.json"
    path.write_text(json.dumps(document))
    register_coco_json(NAME, path, images)
    return path, detections(document)


@pytest.fixture
def output(dataset, tmp_path):
    return finished(tmp_path / "output", dataset)


def finished(folder, dataset, config=None):
    """The files of a finished training that a report reads."""
    config = config or {"DATASETS": {"TEST": ["elsewhere", NAME]}, "TEST": {"PROTOCOL": "aitod"}}
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(dataset[1]))
    return folder


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    folder = finished(tmp_path_factory.mktemp("made") / "<out & put>", dataset)
    assert report.main([str(folder), "--images", "3"]) == 0
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "inference", "report"}
    return folder / "report"


class Page(HTMLParser):
    """Fails if tags are not closed in order."""

    VOID = ("meta", "link", "img", "br", "source")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, *names):
        return [a[name] for _, a in self.tags for name in names if name in a]


def test_the_page_is_whole_and_needs_nothing_else(made):
    text = (made / "report.html").read_text()
    page = Page(text)
    images = page.values("src", "srcset")
    charts = [*made.glob("*.png")]
    # Each chart for light and dark, each scene as a crop and whole.
    assert len(images) == 2 * (len(charts) - 1) + 2 * 3
    assert all(image.startswith("data:image/") for image in images)
    links = {link for link in page.values("href") if link != "data:,"}
    assert not re.search(r"https?:|//[a-z]|<script|url\(|@import", re.sub('data:[^"]*', "", text))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and len(links) > 8 and links <= {f"#{name}" for name in ids}
    assert len(text) < 10_000_000
    for name in (NAME, *CLASSES[:2]):
        assert name in page.text and str(markupsafe.escape(name)) in text
    assert str(markupsafe.escape(made.parent)) in text


def test_every_chart_is_a_picture_too(made):
    names = {path.stem for path in made.glob("*.png")}
    assert names == {*CHARTS, "curves_iou50", "curves_iou75", "contact_sheet"}
    for name in names:
        assert cv2.imread(str(made / f"{name}.png")).std() > 5, name
    assert {path.suffix for path in made.iterdir()} == {".png", ".html", ".json"}


def test_numbers_are_the_evaluators(made, dataset):
    data = json.loads((made / "report.json").read_text())
    evaluation = evaluate_boxes(*dataset, choose_protocol("aitod", 100))
    assert data["protocol"]["name"] == "aitod" and data["dataset"] == NAME
    expected = {k: None if math.isnan(v) else v for k, v in evaluation.metrics.items()}
    assert data["metrics"] == expected
    for row in data["per_class"]:
        assert evaluation.per_class[row["class"]].items() <= row.items()
        assert row["AP"] == evaluation.metrics[f"AP-{row['class']}"]
        assert row["found"] + row["missed"] == row["objects"]
    assert data["errors"]["AP50"] == pytest.approx(evaluation.metrics["AP50"])
    assert data["curves"]["by_iou"]["0.75"][0]["AP"] == pytest.approx(evaluation.metrics["AP75"])
    matches = evaluation.matches
    assert data["counts"]["objects"] == (~matches.truth_ignored).sum()
    matrix = np.array(data["confusion"]["matrix"])
    best = data["threshold"]
    assert np.trace(matrix) == best["right"]
    assert matrix[:, :-1].sum() == best["right"] + best["wrong"]
    assert matrix[:-1].sum() == data["counts"]["objects"]
    kinds = {row["kind"]: row["number"] for row in data["errors"]["kinds"]}
    assert all(kinds.values()) and sum(kinds.values()) - kinds["missed"] == matches.wrong.sum()
    assert sum(data["scores"]["right"]) == matches.correct.sum()
    totals = [row["missed"] + row["wrong"] for row in data["worst"]]
    assert totals == sorted(totals, reverse=True) and len(totals) == 3
    page = Page((made / "report.html").read_text())
    assert f"AP{evaluation.metrics['AP']:.1f}" in page.text
    assert f"{data['threshold']['score']:.2f}" in page.text


def test_a_new_report_takes_the_place_of_the_old_one_whole(output, dataset, monkeypatch):
    written = iter(["first", "second"])

    def write(folder, *_):
        (folder / "report.json").write_text(next(written))

    def fail(folder, *_):
        (folder / "report.json").write_text("third")
        raise OSError(28, "No space left on device")

    for writer, code, content in ((write, 0, "first"), (write, 0, "second"), (fail, 2, "second")):
        monkeypatch.setattr(report, "_write", writer)
        assert report.main([str(output)]) == code
        assert [path.name for path in (output / "report").iterdir()] == ["report.json"]
        assert (output / "report/report.json").read_text() == content
        assert {path.name for path in output.iterdir()} == {"config.yaml", "inference", "report"}


def test_results_from_elsewhere_with_nothing_found(dataset, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    folder = tmp_path / "new" / "folder"
    words = [
        "--results",
        str(tmp_path / "none.json"),
        "--dataset",
        NAME,
        "--protocol",
        "tinyperson",
    ]
    assert report.main([str(folder), *words, "--images", "1"]) == 0
    data = json.loads((folder / "report/report.json").read_text())
    assert data["protocol"]["name"] == "tinyperson" and data["metrics"]["AP50_tiny"] is None
    assert data["errors"]["AP50"] == 0 and data["worst"][0]["missed"] > 0
    Page((folder / "report/report.html").read_text())


def break_config(folder):
    (folder / "config.yaml").unlink()


def break_yaml(folder):
    (folder / "config.yaml").write_text("a: [")


def no_test_set(folder):
    (folder / "config.yaml").write_text('{"dataloader": {"test": {"dataset": {"names": "${x}"}}}}')


def no_results(folder):
    (folder / "inference/coco_instances_results.json").unlink()


def cut_results(folder):
    (folder / "inference/coco_instances_results.json").write_text("[{")


def masks_only(folder):
    (folder / "inference/coco_instances_results.json").write_text('[{"image_id": 1, "score": 1}]')


def another_dataset(folder):
    path = folder / "inference/coco_instances_results.json"
    path.write_text(json.dumps([{**json.loads(path.read_text())[0], "image_id": 4711}]))


def something_else(folder):
    (folder / "report").mkdir()
    (folder / "report/thesis.tex").touch()


@pytest.mark.parametrize(
    ("damage", "words", "message"),
    [
        (break_config, [], "config.yaml does not exist; give"),
        (break_yaml, [], "config.yaml cannot be read (while parsing"),
        (no_test_set, [], "names no test set (found '${x}'); give --dataset"),
        (no_results, [], "train_net.py writes it when it evaluates"),
        (cut_results, [], "not JSON, or cut short"),
        (masks_only, [], "each needs bbox, category_id, image_id, score"),
        (another_dataset, [], "image_id 4711 is not in the ground truth"),
        (something_else, [], "report exists and is not a report; move it away"),
        (None, ["--dataset", "atlantis"], "dataset 'atlantis' is not known"),
        (None, ["--images", "-1"], "--images is -1; it must be 0 or more"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_mistakes(damage, words, message, output, capsys):
    if damage:
        damage(output)
    before = sorted(output.rglob("*"))
    assert report.main([str(output), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dr2net_d2.report: error: ") and message in error
    assert sorted(output.rglob("*")) == before


def test_configs_of_both_styles(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError):
        recorded(tmp_path, None, None)
    assert recorded(tmp_path, "a", None) == Recorded("a", "coco", 100)
    path.write_text(
        "DATASETS: {TEST: [a, b]}\nTEST: {PROTOCOL: visdrone, DETECTIONS_PER_IMAGE: 500}"
    )
    assert recorded(tmp_path, None, None) == Recorded("b", "visdrone", 500)
    assert recorded(tmp_path, "c", "coco") == Recorded("c", "coco", 500)
    path.write_text("DATASETS: {TEST: []}")
    with pytest.raises(ConfigError, match="names no test set"):
        recorded(tmp_path, None, None)
    path.write_text(
        "model: !!python/object/apply:builtins.eval ['exit()']\nshape: !!python/tuple [1, 2]\n"
        "dataloader: {test: {dataset: {names: d}}, evaluator: {protocol: aitod}}"
    )
    assert recorded(tmp_path, None, None) == Recorded("d", "aitod", 100)


def near(pixels, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels.astype(int) - wanted).max(axis=2) < 25).sum()


def scene(missed, shape=(300, 400)):
    empty = np.zeros((0, 4))
    groups = ("ignored", "found", "wrong class", "false positive", "duplicate")
    boxes = dict.fromkeys(groups, empty) | {"missed": np.array(missed, float).reshape(-1, 4)}
    return Scene(np.full((*shape, 3), 128, np.uint8), boxes, {"missed": ["cat"] * len(missed)})


def test_a_scene_shows_the_densest_errors_close_up():
    lonely, dense = [[10, 10, 10, 10]], [[300, 200, 10, 10], [320, 210, 10, 10], [310, 230, 9, 12]]
    picture = scene(lonely + dense)
    x, y, width, height = picture.window()
    assert width == height == 120
    for left, top, w, h in dense:
        assert x <= left and left + w <= x + width and y <= top and top + h <= y + height
    assert x + width <= 400 and y + height <= 300
    crop = draw_scene(picture, (x, y, width, height), 600)
    assert crop.shape == (600, 600, 3) and near(crop, "#FF7A1A") > 1000
    assert near(draw_scene(picture, (0, 100, 200, 100), 600), "#FF7A1A") == 0
    # The crop is larger than the image in one direction; no error at all: the whole image.
    assert scene([[5, 5, 40, 40]], (100, 4000)).window()[3] == 100
    assert scene([]).window() == (0, 0, 400, 300)


def test_pictures_of_a_page_are_limited_in_size():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    free, bound = (len(encode(noise, most)) for most in (10**9, 100_000))
    assert bound * 3 / 4 < 100_000 < free


PROBE = """<script>
const faults = [];
addEventListener("error", event => faults.push(event.message || event.target.tagName), true);
addEventListener("load", () => {
  const root = document.documentElement;
  const images = [...document.images].map(image => image.naturalWidth);
  const wide = [...document.querySelectorAll("main *")].filter(element =>
    element.getBoundingClientRect().right > root.clientWidth + 1 &&
    !element.closest(".table, .chart, .full, nav")).length;
  parent.postMessage({faults, images, wide, width: innerWidth, scroll: root.scrollWidth,
    sections: document.querySelectorAll("section h2").length,
    hidden: getComputedStyle(document.querySelector(".full")).display}, "*");
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_on_a_phone(made, tmp_path):
    page = (made / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("<title>", PROBE + "<title>"))
    # A headless window is at least 500 px wide; a frame is as narrow as a phone.
    (tmp_path / "phone.html").write_text(
        "<!DOCTYPE html><pre id=result></pre><script>onmessage = event => "
        "result.textContent = JSON.stringify(event.data)</script>"
        '<iframe src="page.html" width=400 height=800 style="border:0"></iframe>'
    )
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
        *("--virtual-time-budget=20000", "--dump-dom", (tmp_path / "phone.html").as_uri()),
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium does not answer here")
    match = re.search(r"<pre id=\"result\">(\{.*?\})</pre>", done.stdout)
    if done.returncode and not match:
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    result = json.loads(html.unescape(match[1]))
    assert "CONSOLE" not in done.stderr and result["faults"] == []
    assert len(result["images"]) == len(CHARTS) + 2 + 2 * 3
    assert min(result["images"]) > 0
    assert result["width"] == 400 and result["scroll"] <= 400 and result["wide"] == 0
    assert result["sections"] == 8 and result["hidden"] == "none"
