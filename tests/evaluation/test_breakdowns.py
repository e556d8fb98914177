"""Rows by size, density, score and image against plain loops over the matches."""

import itertools
import math

import numpy as np
import pytest

from dr2net_d2.evaluation import PROTOCOLS, breakdowns, evaluate_boxes
from dr2net_d2.evaluation.error_kinds import KINDS, best_threshold, find_errors
from dr2net_d2.evaluation.tables import read_results, read_truth
from tests.evaluation.plain import overlap
from tests.evaluation.scenes import random_document, random_results, write


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    rng = np.random.default_rng(5)
    document = random_document(rng, images=15)
    results = random_results(rng, document)
    path = write(tmp_path_factory.mktemp("case") / "truth.json", document)
    truth = read_truth(path)
    table = read_results(results, truth)
    errors = find_errors(truth, table, PROTOCOLS["coco"])
    evaluation = evaluate_boxes(path, results)
    scores = [results[i]["score"] if i >= 0 else -1 for i in evaluation.matches.detection]
    rows = [
        {**row, "score": score, "side": math.sqrt(row["area"])}
        for row, score, aside in zip(
            document["annotations"], scores, evaluation.matches.truth_ignored, strict=True
        )
        if not aside
    ]
    return document, results, rows, truth, table, errors, evaluation


def inside(row, value):
    return row["low"] <= value < (math.inf if row["high"] is None else row["high"])


def check_recall(row, objects):
    assert row["objects"] == len(objects)
    assert row["found"] == sum(obj["score"] >= 0 for obj in objects)
    for least, value in row["recall"].items():
        hit = [obj["score"] >= float(least) for obj in objects]
        assert value == (pytest.approx(np.mean(hit)) if hit else None)


def test_recall_by_side(case):
    _, _, objects, truth, _, errors, _ = case
    rows = breakdowns.recall_by_side(errors, truth)
    for row in rows:
        check_recall(row, [obj for obj in objects if inside(row, obj["side"])])
    assert sum(row["objects"] for row in rows) == len(objects)
    assert rows[0]["objects"] and rows[-1]["objects"] and len(rows) > 5
    assert any(obj["side"] in breakdowns.SIDES for obj in objects)


def test_recall_by_density(case):
    document, _, objects, truth, _, errors, _ = case
    number = {image["id"]: 0 for image in document["images"]}
    for obj in objects:
        number[obj["image_id"]] += 1
    rows = breakdowns.recall_by_density(errors, truth)
    for row in rows:
        check_recall(row, [obj for obj in objects if inside(row, number[obj["image_id"]])])
        assert row["images"] == sum(inside(row, n) for n in number.values())
    assert len(rows) > 1 and sum(row["objects"] for row in rows) == len(objects)


def test_curves_are_the_means_of_the_protocols(case):
    *_, errors, evaluation = case
    rows = breakdowns.curves_by_size(evaluation, errors.weights, 0.75)
    assert [row["size"] for row in rows] == ["all", "small", "medium"]  # none is large
    for row in rows:
        assert np.mean(row["precision"]) == pytest.approx(row["AP"] / 100)
        assert row["objects"] == evaluation.per_size[row["size"]]["objects"]
    assert rows[0]["AP"] == pytest.approx(evaluation.metrics["AP75"])
    assert 0 < rows[0]["AP"] < 100


def test_scores_and_calibration(case):
    _, results, _, _, _, errors, evaluation = case
    matches = evaluation.matches
    histogram, rows = breakdowns.by_score(errors), breakdowns.calibration(errors)
    edges = histogram["edges"]
    filled = 0
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        own = [i for i, r in enumerate(results) if low <= r["score"] < high]
        right, wrong = ([i for i in own if rows[i]] for rows in (matches.correct, matches.wrong))
        duplicates = [i for i in wrong if KINDS[errors.kind[i]] == "duplicate"]
        assert histogram["right"][place] == len(right)
        assert histogram["duplicate"][place] == len(duplicates)
        assert histogram["otherwise wrong"][place] == len(wrong) - len(duplicates)
        if right or wrong:
            row = rows[filled]
            filled += 1
            assert (row["low"], row["high"]) == (low, high)
            assert row["precision"] == pytest.approx(len(right) / len(right + wrong))
            score = np.mean([results[i]["score"] for i in right + wrong])
            assert row["score"] == pytest.approx(score)
            assert row["detections"] == len(right + wrong)
    assert filled == len(rows) > 10


def test_duplicates_overlap_the_better_detection(case):
    _, results, _, _, table, errors, evaluation = case
    rows = [
        i
        for i, row in enumerate(results)
        if errors.kind[i] == KINDS.index("duplicate") and row["score"] >= 0.3
    ]
    found = breakdowns.duplicate_overlaps(errors, table, 0.3)
    better = [evaluation.matches.detection[errors.target[i]] for i in rows]
    assert all(
        results[j]["score"] >= results[i]["score"] for i, j in zip(rows, better, strict=True)
    )
    ious = [
        overlap(results[i]["bbox"], results[j]["bbox"], False)
        for i, j in zip(rows, better, strict=True)
    ]
    assert found["duplicates"] == len(rows) > 3
    assert found["objects"] == len({int(errors.target[i]) for i in rows})
    for bound, share in zip(found["iou"], found["removed"], strict=True):
        assert share == pytest.approx(np.mean([iou >= bound for iou in ious]))


def test_numbers_by_kind_class_and_image(case):
    document, results, objects, truth, table, errors, evaluation = case
    score, _ = best_threshold(errors)
    kept = [i for i, row in enumerate(results) if row["score"] >= score]
    kinds = [KINDS[errors.kind[i]] if errors.kind[i] >= 0 else "" for i in range(len(results))]
    wrong = [i for i in kept if evaluation.matches.wrong[i]]
    pointed = {
        int(errors.target[i]) for i in wrong if kinds[i] in ("classification", "localisation")
    }
    missed = [
        math.sqrt(row["area"])
        for j, row in enumerate(document["annotations"])
        if errors.to_find[j] and errors.found_score[j] < score and j not in pointed
    ]
    rows = breakdowns.kinds_by_side(errors, truth, table, score)
    for row in rows:
        for kind, number in row["kinds"].items():
            sides = [math.sqrt(np.prod(results[i]["bbox"][2:])) for i in wrong if kinds[i] == kind]
            assert number == sum(inside(row, s) for s in (missed if kind == "missed" else sides))
    assert sum(sum(row["kinds"].values()) for row in rows) == len(wrong) + len(missed)

    for row, category in zip(
        breakdowns.per_class(errors, truth, table, score), document["categories"], strict=True
    ):
        own = [obj for obj in objects if obj["category_id"] == category["id"]]
        hit = sum(obj["score"] >= score for obj in own)
        false = sum(results[i]["category_id"] == category["id"] for i in wrong)
        assert row == {
            **{"class": category["name"], "found": hit, "missed": len(own) - hit, "wrong": false},
            "precision": pytest.approx(hit / (hit + false)),
            "recall": pytest.approx(hit / len(own)),
        }

    numbers = breakdowns.per_image(errors, truth, table, score)
    for place, image in enumerate(sorted(row["id"] for row in document["images"])):
        lost = [obj for obj in objects if obj["image_id"] == image and obj["score"] < score]
        own = [i for i in wrong if results[i]["image_id"] == image]
        assert numbers["missed"][place] == len(lost)
        assert numbers["wrong"][place] == len(own)
        for key, kind in (("wrong class", "classification"), ("duplicates", "duplicate")):
            assert numbers[key][place] == sum(kinds[i] == kind for i in own)


def test_largest_confusions():
    matrix = np.array([[5, 1, 0, 4], [3, 0, 2, 0], [0, 0, 9, 0], [8, 8, 8, 0]])
    rows = breakdowns.largest_confusions(matrix, ["a", "b", "c"], most=2)
    assert rows == [
        {"object": "b", "detected as": "a", "number": 3, "share": 0.6},
        {"object": "b", "detected as": "c", "number": 2, "share": 0.4},
    ]
    assert len(breakdowns.largest_confusions(matrix, ["a", "b", "c"])) == 3
