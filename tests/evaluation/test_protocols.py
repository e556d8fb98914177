"""The protocols of VisDrone and TinyPerson, by hand and against plain loops."""

import json
import math

import numpy as np
import pytest

from dr2net_d2.errors import ConfigError, DatasetError
from dr2net_d2.evaluation import PROTOCOLS, choose_protocol, evaluate_boxes
from tests.evaluation import plain
from tests.evaluation.scenes import random_document, random_results, write


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["visdrone", "tinyperson"])
def test_equals_plain_loops(name, seed, tmp_path):
    rng = np.random.default_rng(seed)
    document = random_document(rng, images=120, regions=name == "visdrone")
    if name == "visdrone":
        document["categories"].append({"id": 8, "name": "others"})
        document["annotations"].append(
            {"id": 10**6, "image_id": 3, "category_id": 8, "bbox": [1, 1, 9, 9], "iscrowd": 1}
        )
    results = random_results(rng, document)
    if name == "tinyperson":
        keep_from_thresholds(document, results)
    path = write(tmp_path / "truth.json", document)
    ours = evaluate_boxes(path, results, PROTOCOLS[name]).metrics
    expected = getattr(plain, name)(document, results)
    names = [metric.name for metric in PROTOCOLS[name].metrics]
    assert set(names) == expected.keys()
    assert {key: ours[key] for key in names} == pytest.approx(expected, abs=1e-9)
    assert len({round(value, 3) for value in expected.values()}) > 5
    assert "AP-others" not in ours


def keep_from_thresholds(document, results):
    """Remove detections with a cover at a threshold, where TinyPerson's code rounds differently."""
    truth = plain.per_image(document, document["annotations"])
    for row in [*results]:
        for other in truth[row["image_id"]]:
            share = plain.overlap(row["bbox"], other["bbox"], True)
            if min(abs(share - t) for t in (0.25, 0.5, 0.75)) < 1e-9:
                results.remove(row)
                break


@pytest.fixture
def scene(tmp_path):
    """``scene(boxes, ignored, regions)``: one image of 100 x 100 px, class 1 of two."""

    def build(boxes, ignored=(), regions=()):
        rows = [(box, 0) for box in boxes] + [(box, 1) for box in ignored]
        document = {
            "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 100}],
            "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": crowd}
                for i, (box, crowd) in enumerate(rows, 1)
            ],
            "ignore_regions": [
                {"id": i, "image_id": 1, "bbox": box} for i, box in enumerate(regions)
            ],
        }
        return write(tmp_path / "scene.json", document)

    return build


def found(*boxes, category=1):
    return [
        {"image_id": 1, "category_id": category, "bbox": box, "score": 1 - i / 1000}
        for i, box in enumerate(boxes)
    ]


def test_visdrone_takes_the_500_best_of_all_classes(scene):
    path = scene([[10, 10, 20, 20]])
    others = found(*[[50, 50, 9, 9]] * 499, category=2)
    last = [{**found([10, 10, 20, 20])[0], "score": 0.1}]
    protocol = PROTOCOLS["visdrone"]
    assert evaluate_boxes(path, others + last, protocol).metrics["AP"] == pytest.approx(100)
    results = others + found([50, 50, 9, 9], category=2) + last
    evaluation = evaluate_boxes(path, results, protocol)
    assert evaluation.metrics["AP"] == 0
    assert not evaluation.matches.counted[-1] and evaluation.matches.counted[:-1].all()
    assert evaluate_boxes(path, results).metrics["AP"] == pytest.approx(100)


def test_visdrone_averages_over_every_recall(scene):
    """Correct, wrong, correct of 3 objects: 1/3 + 1/3 * 2/3; COCO has (34 + 33 * 2/3) / 101."""
    path = scene([[10, 10, 20, 20], [40, 40, 20, 20], [70, 70, 20, 20]])
    results = found([10, 10, 20, 20], [70, 10, 20, 20], [40, 40, 20, 20])
    metrics = evaluate_boxes(path, results, PROTOCOLS["visdrone"]).metrics
    assert metrics["AP"] == pytest.approx(100 * 5 / 9)
    assert (metrics["AR1"], metrics["AR500"]) == pytest.approx((100 / 3, 200 / 3))
    assert evaluate_boxes(path, results).metrics["AP"] == pytest.approx(100 * (34 + 22) / 101)


def test_visdrones_ignored_objects_take_many_and_count_as_not_found(scene):
    path = scene([[10, 10, 20, 20]], ignored=[[40, 40, 40, 40]])
    # Two within the ignored object, one with half of its area, one with less.
    within = ([45, 45, 9, 9], [60, 60, 9, 9], [30, 40, 20, 20], [29, 40, 20, 20])
    results = found(*within, [10, 10, 20, 20])
    evaluation = evaluate_boxes(path, results, PROTOCOLS["visdrone"])
    assert evaluation.matches.ignored.tolist() == [True, True, True, False, False]
    assert evaluation.matches.truth.tolist() == [1, 1, 1, -1, 0]
    assert evaluation.metrics["AP50"] == pytest.approx(100 / 2 / 2)
    assert evaluation.metrics["AR500"] == pytest.approx(50)


def test_visdrones_classes_weigh_as_their_images(tmp_path):
    rows = [(1, 1), (2, 1), (3, 1), (3, 2)]
    document = {
        "images": [{"id": i, "file_name": f"{i}", "width": 50, "height": 50} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": [5, 5, 20, 20]}
            for i, (image, category) in enumerate(rows, 1)
        ],
    }
    path = write(tmp_path / "truth.json", document)
    result = {"image_id": 3, "category_id": 2, "bbox": [5, 5, 20, 20], "score": 1.0}
    assert evaluate_boxes(path, [result], PROTOCOLS["visdrone"]).metrics["AP"] == pytest.approx(25)
    assert evaluate_boxes(path, [result]).metrics["AP"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ([30, 30, 10, 10], True),
        # A region at 20, 41 px wide, has pixels 20 to 61; a box at 14, 10 px wide, has 15 to 24.
        ([14, 30, 10, 10], True),
        ([13, 30, 10, 10], False),
        ([13.5, 30, 10, 10], True),
        ([56, 30, 10, 10], True),
        ([57, 30, 10, 10], False),
        ([90, 90, 40, 40], False),
    ],
)
def test_visdrones_ignore_regions_drop_what_is_at_least_half_inside(scene, box, inside):
    # Two regions that overlap count once: their union is the first.
    path = scene([box, [80, 5, 8, 8]], regions=[[20, 20, 41, 41], [20, 20, 41, 30]])
    evaluation = evaluate_boxes(path, found(box, box), PROTOCOLS["visdrone"])
    assert evaluation.matches.counted.tolist() == [not inside] * 2
    assert evaluation.matches.truth_ignored.tolist() == [inside, False]
    assert evaluate_boxes(path, found(box)).matches.counted.all()


def test_tinypersons_objects_of_other_sizes_excuse_what_lies_within(scene):
    """A box of 6 px on a person of 30 px is wrong for COCO, but ignored in smaller size bins."""
    path = scene([[10, 10, 30, 30], [60, 60, 6, 6]])
    results = found([12, 12, 6, 6], [60, 60, 6, 6])
    metrics = evaluate_boxes(path, results, PROTOCOLS["tinyperson"]).metrics
    assert metrics["AP50_tiny1"] == pytest.approx(100)
    assert metrics["AP50_all"] == pytest.approx(100 * 51 / 101 / 2)
    assert math.isnan(metrics["AP50_tiny2"])
    assert metrics["AP50_small"] == 0
    assert next(iter(metrics)) == "AP50_tiny"


def test_tinypersons_ignored_boxes_excuse_detections(scene):
    path = scene([[60, 60, 6, 6]], ignored=[[0, 0, 40, 40]])
    results = found([5, 5, 6, 6], [15, 15, 6, 6], [38, 5, 6, 6], [60, 60, 6, 6])
    evaluation = evaluate_boxes(path, results, PROTOCOLS["tinyperson"])
    assert evaluation.matches.ignored.tolist() == [True, True, False, False]
    assert evaluation.metrics["AP50_tiny"] == pytest.approx(50)


def test_sizes_classes_and_densities_are_told_apart(tmp_path):
    boxes = {1: [[12 * i, 2, 6, 6] for i in range(10)], 2: [[9 * i, 2, 7, 7] for i in range(11)]}
    document = {
        "images": [{"id": i, "file_name": f"{i}", "width": 200, "height": 50} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}],
        "annotations": [
            {"id": 100 * image + i, "image_id": image, "category_id": 1, "bbox": box}
            for image, group in boxes.items()
            for i, box in enumerate(group)
        ],
    }
    document["annotations"].append(
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 20, 20, 20], "iscrowd": 1}
    )
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5 + i / 100}
        for i, box in enumerate(boxes[1])
    ]
    path = write(tmp_path / "truth.json", document)
    evaluation = evaluate_boxes(path, results, PROTOCOLS["aitod"])
    nothing = {"AP": 0, "AP50": 0, "AR": 0}
    all_found = {"AP": 100, "AP50": 100, "AR": 100}
    densities = evaluation.per_density
    assert densities["0-10"] == pytest.approx({**all_found, "objects": 10, "images": 2})
    assert densities["11-100"] == {**nothing, "objects": 11, "images": 1}
    assert densities["101-1000"]["images"] == densities["1001+"]["objects"] == 0
    assert math.isnan(densities["1001+"]["AP"])
    half = {"AP": 100 * 48 / 101, "AP50": 100 * 48 / 101, "AR": 1000 / 21}
    assert evaluation.per_size["verytiny"] == pytest.approx({**half, "objects": 21, "images": 2})
    assert evaluation.per_class["car"] == pytest.approx({**half, "objects": 21, "images": 2})
    assert evaluation.per_class["van"]["objects"] == evaluation.per_size["small"]["objects"] == 0

    evaluation.save(tmp_path / "evaluation.json")
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["protocol"] == "aitod" and "1500" in saved["description"]
    assert saved["metrics"]["APvt"] == evaluation.metrics["APvt"]
    assert saved["metrics"]["APm"] is None and saved["per_size"]["tiny"]["AP"] is None
    assert evaluation.table().splitlines()[0].split()[1::2][:4] == ["AP", "AP50", "AP75", "APvt"]


def test_what_cannot_be_evaluated_is_named(scene):
    path = scene([[10, 10, 20, 20]])
    for wrong, message in (
        ({"image_id": 7}, "image_id 7"),
        ({"category_id": 5}, "category_id 5"),
        ({"score": math.nan}, "nan.*not finite"),
    ):
        with pytest.raises(DatasetError, match=message):
            evaluate_boxes(path, [{**found([1, 1, 9, 9])[0], **wrong}])
    with pytest.raises(
        ConfigError, match=r"'voc'; choose one of coco, aitod, visdrone, tinyperson"
    ):
        choose_protocol("voc", 100)
