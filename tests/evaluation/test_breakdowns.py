"""Breakdowns by size, density, score, class and image against plain loops over the matches."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from dr2net_d2.evaluation import PROTOCOLS, breakdowns, evaluate_boxes
from dr2net_d2.evaluation.error_kinds import KINDS, best_threshold, find_errors
from dr2net_d2.evaluation.tables import read_results, read_truth
from tests.evaluation.plain import overlap
from tests.evaluation.scenes import random_document, random_results, write

THRESHOLD = 0.35


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


def inside(group, value):
    return group.low <= value < group.high


def check_recall(group, objects):
    assert group.objects == len(objects)
    assert group.matched == sum(obj["score"] >= 0 for obj in objects)
    assert group.matched_at_threshold == sum(obj["score"] >= THRESHOLD for obj in objects)
    assert group.images == len({obj["image_id"] for obj in objects})
    assert [*group.recall] == [0, 0.1, 0.3, 0.5, 0.7]
    for minimum, value in group.recall.items():
        hit = [obj["score"] >= minimum for obj in objects]
        assert value == pytest.approx(np.mean(hit) if hit else math.nan, nan_ok=True)


def test_recall_by_side(case):
    _, _, objects, truth, _, errors, _ = case
    groups = breakdowns.recall_by_side(errors, truth, THRESHOLD)
    for group in groups:
        check_recall(group, [obj for obj in objects if inside(group, obj["side"])])
    assert sum(group.objects for group in groups) == len(objects)
    assert groups[0].objects and groups[-1].objects and len(groups) > 5
    assert any(obj["side"] in breakdowns.SIDES for obj in objects)


def test_recall_by_density(case):
    document, _, objects, truth, _, errors, _ = case
    number = {image["id"]: 0 for image in document["images"]}
    for obj in objects:
        number[obj["image_id"]] += 1
    groups = breakdowns.recall_by_density(errors, truth, THRESHOLD)
    for group in groups:
        check_recall(group, [obj for obj in objects if inside(group, number[obj["image_id"]])])
        assert group.images == sum(inside(group, n) for n in number.values())
    assert len(groups) > 1 and sum(group.objects for group in groups) == len(objects)


def test_curves_are_the_means_of_the_protocols(case):
    *_, errors, evaluation = case
    curves = breakdowns.curves_by_size(evaluation, errors.class_weights, 0.75)
    assert [curve.size for curve in curves] == ["all", "small", "medium"]  # none is large
    for curve in curves:
        assert np.mean(curve.precision) == pytest.approx(curve.average_precision / 100)
        assert curve.objects == evaluation.per_size[curve.size]["objects"]
    assert curves[0].average_precision == pytest.approx(evaluation.metrics["AP75"])
    assert 0 < curves[0].average_precision < 100


def test_scores_and_calibration(case):
    _, results, _, _, _, errors, evaluation = case
    matches = evaluation.matches
    histogram, bins = breakdowns.score_histogram(errors), breakdowns.calibration(errors)
    edges = histogram.edges
    filled = 0
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        own = [i for i, r in enumerate(results) if low <= r["score"] < high]
        right, wrong = ([i for i in own if rows[i]] for rows in (matches.correct, matches.wrong))
        duplicates = [i for i in wrong if KINDS[errors.kind[i]] == "duplicate"]
        assert histogram.correct[place] == len(right)
        assert histogram.duplicate[place] == len(duplicates)
        assert histogram.other_wrong[place] == len(wrong) - len(duplicates)
        if right or wrong:
            row = bins[filled]
            filled += 1
            assert (row.low, row.high) == (low, high)
            assert row.precision == pytest.approx(len(right) / len(right + wrong))
            score = np.mean([results[i]["score"] for i in right + wrong])
            assert row.score == pytest.approx(score)
            assert row.detections == len(right + wrong)
    assert filled == len(bins) > 10


def test_duplicates_overlap_the_better_detection(case):
    _, results, _, _, table, errors, evaluation = case
    rows = [
        i
        for i, row in enumerate(results)
        if errors.kind[i] == KINDS.index("duplicate") and row["score"] >= 0.3
    ]
    overlaps = breakdowns.duplicate_overlaps(errors, table, 0.3)
    better = [evaluation.matches.detection[errors.target[i]] for i in rows]
    assert all(
        results[j]["score"] >= results[i]["score"] for i, j in zip(rows, better, strict=True)
    )
    ious = [
        overlap(results[i]["bbox"], results[j]["bbox"], False)
        for i, j in zip(rows, better, strict=True)
    ]
    assert overlaps.duplicates == len(rows) > 3
    assert overlaps.objects == len({int(errors.target[i]) for i in rows})
    for bound, share in zip(overlaps.iou, overlaps.removed, strict=True):
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
        if errors.matches.to_find[j] and errors.matched_score[j] < score and j not in pointed
    ]
    groups = breakdowns.kinds_by_side(errors, truth, table, score)
    for group in groups:
        for kind, number in group.numbers.items():
            sides = [math.sqrt(np.prod(results[i]["bbox"][2:])) for i in wrong if kinds[i] == kind]
            assert number == sum(inside(group, s) for s in (missed if kind == "missed" else sides))
    assert sum(sum(group.numbers.values()) for group in groups) == len(wrong) + len(missed)

    for row, category in zip(
        breakdowns.errors_by_class(errors, truth, table, score), document["categories"], strict=True
    ):
        own = [obj for obj in objects if obj["category_id"] == category["id"]]
        hit = sum(obj["score"] >= score for obj in own)
        false = sum(results[i]["category_id"] == category["id"] for i in wrong)
        assert dataclasses.asdict(row) == {
            **{"name": category["name"], "matched": hit, "missed": len(own) - hit, "wrong": false},
            "precision": pytest.approx(hit / (hit + false)),
            "recall": pytest.approx(hit / len(own)),
        }

    numbers = breakdowns.errors_by_image(errors, truth, table, score)
    for place, image in enumerate(sorted(row["id"] for row in document["images"])):
        lost = [obj for obj in objects if obj["image_id"] == image and obj["score"] < score]
        own = [i for i in wrong if results[i]["image_id"] == image]
        assert numbers.missed[place] == len(lost)
        assert numbers.wrong[place] == len(own)
        assert numbers.wrong_class[place] == sum(kinds[i] == "classification" for i in own)
        assert numbers.duplicates[place] == sum(kinds[i] == "duplicate" for i in own)


def test_largest_confusions():
    matrix = np.array([[5, 1, 0, 4], [3, 0, 2, 0], [0, 0, 9, 0], [8, 8, 8, 0]])
    rows = breakdowns.largest_confusions(matrix, ["a", "b", "c"], limit=2)
    assert rows == [
        breakdowns.Confusion(actual="b", predicted="a", number=3, share=0.6),
        breakdowns.Confusion(actual="b", predicted="c", number=2, share=0.4),
    ]
    assert len(breakdowns.largest_confusions(matrix, ["a", "b", "c"])) == 3
