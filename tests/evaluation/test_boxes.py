import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dr2net_d2.evaluation import choose_protocol, evaluate_boxes


@pytest.fixture
def dataset(tmp_path):
    """``dataset(boxes)``: a JSON of boxes {(image_id, category_id): [[x, y, w, h], ...]}."""

    def write(boxes, names=("cat", "dog")):
        annotations = [
            {"image_id": image, "category_id": category, "bbox": box}
            for (image, category), group in boxes.items()
            for box in group
        ]
        document = {
            "images": [
                {"id": image, "file_name": f"{image}.png", "height": 500, "width": 500}
                for image in sorted({image for image, _ in boxes})
            ],
            "annotations": [{"id": i + 1, **row} for i, row in enumerate(annotations)],
            "categories": [{"id": 5 * i + 2, "name": name} for i, name in enumerate(names)],
        }
        path = tmp_path / "truth.json"
        path.write_text(json.dumps(document))
        return path

    return write


def coco_metrics(path, results, most=100):
    return evaluate_boxes(path, results, choose_protocol("coco", most)).metrics


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_by_hand(dataset):
    path = dataset({(1, 2): [[0, 0, 10, 10], [100, 100, 10, 10]], (1, 7): [[200, 200, 50, 50]]})
    results = [
        result(1, 2, [0, 0, 10, 10], 0.9),  # exact
        result(1, 2, [300, 300, 10, 10], 0.8),  # nowhere
        result(1, 2, [100, 100, 10, 8], 0.7),  # IoU 0.8: found at thresholds up to 0.8
        result(1, 7, [200, 200, 50, 30], 0.9),  # IoU 0.6: found at 0.5, 0.55 and 0.6
    ]
    metrics = coco_metrics(path, results)
    # Precision 1 to recall 0.5 (51 of 101 points), then 2/3 where the third counts, else 0.
    with_third, without = (51 + 50 * 2 / 3) / 101, 51 / 101
    cat = (7 * with_third + 3 * without) / 10
    assert metrics["AP-cat"] == pytest.approx(100 * cat)
    assert metrics["AP-dog"] == pytest.approx(30)
    assert metrics["AP"] == pytest.approx((100 * cat + 30) / 2)
    assert metrics["AP50"] == pytest.approx(50 * (with_third + 1))
    assert metrics["AP75"] == pytest.approx(50 * with_third)
    assert metrics["APs"] == pytest.approx(100 * cat)
    assert metrics["APm"] == pytest.approx(30)
    assert math.isnan(metrics["APl"])


def test_equals_pycocotools_summary(dataset):
    rng = np.random.default_rng(0)
    truth = {
        (image, category): np.round(rng.uniform(5, 200, (4, 4)), 1).tolist()
        for image in range(1, 6)
        for category in (2, 7)
    }
    results = [
        result(image, category, (np.array(box) + rng.normal(0, 4, 4)).tolist(), rng.random())
        for (image, category), boxes in truth.items()
        for box in boxes[:3] * 2
    ]
    path = dataset(truth)
    metrics = coco_metrics(path, results)
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        row |= {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
    path.write_text(json.dumps(document))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        reference = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    ours = [metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    expected = [100 * stat if stat >= 0 else math.nan for stat in reference.stats[:6]]
    assert ours == pytest.approx(expected, nan_ok=True)
    assert 0 < metrics["AP"] < 100


def test_more_than_100_detections_count_if_asked(dataset):
    boxes = [[10 * (i % 20), 10 * (i // 20), 8, 8] for i in range(150)]
    path = dataset({(1, 2): boxes}, names=("cat",))
    results = [result(1, 2, box, 1 - i / 1000) for i, box in enumerate(boxes)]
    assert coco_metrics(path, results, 150)["AP"] == pytest.approx(100)
    assert coco_metrics(path, results)["AP"] == pytest.approx(100 * 67 / 101)
    assert "AP-cat" not in coco_metrics(path, results)


def test_nothing_found_is_nan_as_in_detectron2(dataset):
    metrics = coco_metrics(dataset({(1, 2): [[0, 0, 10, 10]]}), [])
    assert metrics.keys() == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert all(map(math.isnan, metrics.values()))


def test_results_are_not_changed_and_nothing_is_printed(dataset, capsys):
    results = [result(1, 2, [0, 0, 10, 10], 0.9)]
    before = copy.deepcopy(results)
    coco_metrics(dataset({(1, 2): [[0, 0, 10, 10]]}), results)
    assert results == before
    assert capsys.readouterr().out == ""
