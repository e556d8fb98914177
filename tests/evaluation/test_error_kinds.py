"""Kinds of errors, their gains, and confusions: by hand, and against plain loops."""

import json
import math

import numpy as np
import pytest

from dr2net_d2.evaluation import PROTOCOLS, evaluate_boxes
from dr2net_d2.evaluation.error_kinds import KINDS, best_threshold, confusion, find_errors
from dr2net_d2.evaluation.tables import read_results, read_truth
from tests.evaluation.plain import coco_average, overlap, voc_average
from tests.evaluation.scenes import random_document, random_results, write

CAT, DOG = 2, 4


def found(path, results, protocol="coco"):
    truth = read_truth(path)
    table = read_results(results, truth)
    return find_errors(truth, table, PROTOCOLS[protocol]), truth, table


def names(errors):
    return [KINDS[kind] if kind >= 0 else "" for kind in errors.kind]


@pytest.fixture
def scene(tmp_path):
    """``scene(objects, detections)``: rows (category, box, "crowd") and (category, box, score)."""

    def build(objects, detections, regions=(), protocol="coco"):
        document = {
            "images": [{"id": 1, "file_name": "1.png", "width": 500, "height": 500}],
            "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
            "annotations": [
                {
                    "id": i,
                    "image_id": 1,
                    "category_id": category,
                    "bbox": box,
                    "iscrowd": len(crowd),
                }
                for i, (category, box, *crowd) in enumerate(objects, start=1)
            ],
            "ignore_regions": [{"id": 1, "image_id": 1, "bbox": box} for box in regions],
        }
        results = [
            {"image_id": 1, "category_id": category, "bbox": box, "score": score}
            for category, box, score in detections
        ]
        return found(write(tmp_path / "scene.json", document), results, protocol)

    return build


def test_each_kind_by_hand(scene):
    errors, truth, table = scene(
        [
            (CAT, [0, 0, 10, 10]),
            (CAT, [100, 0, 10, 10]),
            (DOG, [200, 0, 10, 10]),
            (DOG, [300, 0, 10, 10]),
            (CAT, [400, 0, 10, 10]),
        ],
        [
            (CAT, [0, 0, 10, 10], 0.9),  # right
            (CAT, [0, 0, 10, 9], 0.8),  # the same object again
            (CAT, [107, 0, 10, 10], 0.7),  # IoU 3/17
            (DOG, [100, 0, 10, 8], 0.6),  # a cat
            (DOG, [0, 3, 10, 20], 0.5),  # IoU 7/23 with a cat
            (DOG, [0, 200, 10, 10], 0.4),  # nothing
            (DOG, [209, 0, 10, 10], 0.3),  # IoU 1/19 with a dog: nothing, either
            (DOG, [300, 0, 10, 10], 0.2),  # right
        ],
    )
    assert names(errors) == [
        *("", "duplicate", "localisation", "classification"),
        *("both", "background", "background", ""),
    ]
    assert errors.target.tolist() == [-1, 0, 1, 1, -1, -1, -1, -1]
    assert errors.matches.detection.tolist() == [0, -1, -1, 7, -1]
    # The second cat is missed, but two errors point to it.
    assert np.flatnonzero(errors.missed).tolist() == [2, 4]
    # cat: 1 of 3 at precision 1; dog: 1 of 2 at precision 1/5.
    cat, dog = 34 / 101, 51 / 101 / 5
    assert errors.ap50 == pytest.approx(50 * (cat + dog))
    gained = {
        "localisation": (34 + 33 * 2 / 3) / 101 - cat,  # 2 of 3, the second at precision 2/3
        "classification": 51 / 101 / 4 - dog,  # the dog goes: the cat is the localisation's
        "both": 51 / 101 / 4 - dog,
        "duplicate": 0,
        "background": 51 / 101 / 3 - dog,
        "missed": 51 / 101 - cat + 1 / 5 - dog,
        "false positives": 51 / 101 - dog,
        "false negatives": 1 - cat + 1 / 5 - dog,
    }
    assert errors.gains == {name: pytest.approx(50 * gain) for name, gain in gained.items()}
    # From 0.9 on 1 is right; from 0.2 on 2 are right and 6 wrong, of 5.
    assert best_threshold(errors) == pytest.approx((0.9, 2 * 1 / (1 + 5)))
    matrix = confusion(errors, truth, table, 0.2)
    assert matrix.tolist() == [[1, 1, 1], [0, 1, 1], [2, 3, 0]]
    assert confusion(errors, truth, table, 0.65).tolist() == [[1, 0, 2], [0, 0, 2], [2, 0, 0]]


def test_the_first_kind_that_holds_counts(scene):
    both_here = [(CAT, [0, 0, 10, 10]), (DOG, [0, 0, 10, 10]), (DOG, [105, 0, 10, 10])]
    detections = [
        (CAT, [0, 0, 10, 10], 0.9),
        (CAT, [0, 0, 10, 9], 0.8),  # a duplicate, and on a dog
        (DOG, [0, 0, 10, 10], 0.7),
        (CAT, [105, 0, 10, 10], 0.6),
        (DOG, [5, 0, 10, 10], 0.5),  # IoU 1/3 with both
    ]
    errors, *_ = scene(both_here, detections)
    assert names(errors) == ["", "classification", "", "classification", "localisation"]
    assert errors.target.tolist() == [-1, 1, -1, 2, 1]
    # The dog of the first one is found; so is that of the localisation.
    assert errors.gains["localisation"] == 0


def test_the_best_of_several_that_point_to_an_object_is_mended(scene):
    detections = [(DOG, [0, 0, 10, 10], 0.3), (DOG, [0, 0, 10, 9], 0.8), (CAT, [50, 0, 9, 9], 0.5)]
    errors, *_ = scene([(CAT, [0, 0, 10, 10])], detections)
    assert names(errors) == ["classification", "classification", "background"]
    # At 0.8 it stands before the false positive; at 0.3 precision would be 1/2.
    assert errors.gains["classification"] == pytest.approx(100)
    errors, *_ = scene([(CAT, [0, 0, 10, 10])], detections[::2])
    assert errors.gains["classification"] == pytest.approx(50)


def test_a_class_that_is_never_found_counts_no_more_once_its_objects_are_gone(scene):
    errors, *_ = scene([(CAT, [0, 0, 9, 9]), (DOG, [99, 0, 9, 9])], [(CAT, [0, 0, 9, 9], 0.5)])
    assert (errors.ap50, errors.gains["missed"]) == (pytest.approx(50), pytest.approx(50))


def test_what_is_ignored_is_no_error(scene):
    objects = [(CAT, [0, 0, 40, 40], "crowd"), (DOG, [100, 100, 20, 20])]
    detections = [(CAT, [5, 5, 10, 10], 0.9), (DOG, [100, 100, 20, 20], 0.5)]
    errors, truth, table = scene(objects, detections)
    assert names(errors) == ["", ""] and not errors.matches.wrong.any() and not errors.missed.any()
    assert confusion(errors, truth, table, 0).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    # A detection and an object in an ignore region, by a protocol that knows them.
    inside = [*objects, (DOG, [310, 310, 20, 20])], [*detections, (DOG, [350, 350, 20, 20], 0.8)]
    errors, *_ = scene(*inside, regions=[[300, 300, 100, 100]], protocol="visdrone")
    assert (
        names(errors) == ["", "", ""] and not errors.missed.any() and not errors.matches.counted[2]
    )
    errors, *_ = scene(*inside, regions=[[300, 300, 100, 100]])
    assert names(errors) == ["", "", "background"] and errors.missed.tolist() == [
        False,
        False,
        True,
    ]


def test_without_objects_or_detections(scene):
    errors, truth, table = scene([], [(CAT, [0, 0, 9, 9], 0.5)])
    assert names(errors) == ["background"] and best_threshold(errors) == (0, 0)
    assert math.isnan(errors.ap50) and all(map(math.isnan, errors.gains.values()))
    errors, truth, table = scene([(CAT, [0, 0, 9, 9])], [])
    assert errors.ap50 == 0 and best_threshold(errors) == (0, 0)
    assert confusion(errors, truth, table, 0).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def plain_kinds(document, results, matches, to_find):
    """(kind, target) of each detection, ("", None) unless it is wrong; object by object."""
    kinds = []
    for i, row in enumerate(results):
        if not matches.wrong[i]:
            kinds.append(("", None))
            continue
        own = other = (0, None)
        for j, truth in enumerate(document["annotations"]):
            if truth["image_id"] != row["image_id"] or not to_find[j]:
                continue
            value = overlap(row["bbox"], truth["bbox"], False)
            if truth["category_id"] == row["category_id"]:
                own = max(own, (value, -j), key=lambda pair: pair[0])
            else:
                other = max(other, (value, -j), key=lambda pair: pair[0])
        if 0.1 <= own[0] <= 0.5:
            kinds.append(("localisation", -own[1]))
        elif other[0] >= 0.5:
            kinds.append(("classification", -other[1]))
        elif own[0] >= 0.5:
            kinds.append(("duplicate", -own[1]))
        elif max(own[0], other[0]) <= 0.1:
            kinds.append(("background", None))
        else:
            kinds.append(("both", None))
    return kinds


def plain_ap50(rows, objects, classes, weights, protocol):
    """``rows``: (class, score, correct) of each counted detection, equal scores in their order."""
    values, total = 0, 0
    for category in classes:
        if not objects[category]:
            continue
        own = sorted((row for row in rows if row[0] == category), key=lambda row: -row[1])
        right = np.array([row[2] for row in own], int)
        if protocol.interpolation == "all points":
            recall = np.cumsum(right) / objects[category]
            value = voc_average(recall, np.cumsum(right) / np.arange(1, len(right) + 1))
        else:
            value = coco_average(right, np.array([row[1] for row in own]), objects[category])
        values, total = values + weights[category] * value, total + weights[category]
    return 100 * values / total


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("seed", range(3))
def test_random_scenes_against_plain_loops(name, seed, tmp_path):
    rng = np.random.default_rng(seed)
    protocol = PROTOCOLS[name]
    document = random_document(rng, images=12, regions=protocol.ignore_regions)
    results = random_results(rng, document)
    path = write(tmp_path / "truth.json", document)
    evaluation = evaluate_boxes(path, json.loads(json.dumps(results)), protocol)
    matches, annotations = evaluation.matches, document["annotations"]
    to_find = ~matches.truth_ignored
    errors, *_ = found(path, results, name)

    kinds = plain_kinds(document, results, matches, to_find)
    assert names(errors) == [kind for kind, _ in kinds]
    assert len({kind for kind, _ in kinds}) == 6
    targets = [-1 if target is None else target for _, target in kinds]
    assert errors.target.tolist() == targets
    pointed = {t for kind, t in kinds if kind in ("localisation", "classification")}
    missed = [bool(matches.missed[j]) and j not in pointed for j in range(len(annotations))]
    assert errors.missed.tolist() == missed

    classes = [row["id"] for row in document["categories"]]
    column = {category: k for k, category in enumerate(classes)}
    t = protocol.iou_thresholds.index(0.5)
    order = sorted(range(len(results)), key=lambda i: results[i]["image_id"])
    # The objects that the protocol's recall is relative to.
    in_recall = to_find.copy()
    weights = dict.fromkeys(classes, 1)
    if protocol.recall_of_ignored:
        regions_aside = find_inside(document, protocol, path)
        in_recall = ~regions_aside
        weights = {
            c: len({a["image_id"] for a, keep in zip(annotations, in_recall, strict=True)
                    if keep and a["category_id"] == c})
            for c in classes
        }  # fmt: skip

    def ap50(change=lambda i: None, gone=lambda j: False):
        """``change(i)``: "away", the class that makes detection i correct, or None to keep it."""
        rows, objects = [], dict.fromkeys(classes, 0)
        for j, row in enumerate(annotations):
            objects[row["category_id"]] += bool(in_recall[j]) and not gone(j)
        for i in order:
            changed = change(i)
            if changed == "away" or not (matches.correct[i] or matches.wrong[i]):
                continue
            category = results[i]["category_id"] if changed is None else changed
            right = matches.correct[i] or changed is not None
            rows.append((category, results[i]["score"], right))
        return plain_ap50(rows, objects, classes, weights, protocol)

    average = evaluation.average_precision[t, :, 0, -1]
    expected = np.average(average, weights=[weights[c] for c in classes])
    assert ap50() == pytest.approx(100 * expected) == pytest.approx(errors.ap50)
    assert [column[c] for c in classes] == errors.classes

    best = {}
    for i in sorted(order, key=lambda i: -results[i]["score"]):
        kind, target = kinds[i]
        if kind in ("localisation", "classification") and matches.detection[target] < 0:
            best.setdefault(target, i)

    def mend(kind):
        def change(i):
            if kinds[i][0] != kind:
                return None
            target = kinds[i][1]
            if kind in ("localisation", "classification") and best.get(target) == i:
                return annotations[target]["category_id"]
            return "away"

        return change

    gains = {kind: ap50(mend(kind)) for kind in KINDS[:-1]}
    gains["missed"] = ap50(gone=lambda j: missed[j])
    gains["false positives"] = ap50(lambda i: "away" if matches.wrong[i] else None)
    gains["false negatives"] = ap50(gone=lambda j: bool(matches.missed[j]))
    for kind, value in gains.items():
        assert errors.gains[kind] == pytest.approx(max(value - errors.ap50, 0), abs=1e-9), kind
    assert sum(gain > 0 for gain in errors.gains.values()) >= 6


def find_inside(document, protocol, path):
    """Objects inside ignore regions: those that are ignored even if none is a crowd."""
    plain = {**document, "annotations": [{**a, "iscrowd": 0} for a in document["annotations"]]}
    return evaluate_boxes(write(path, plain), [], protocol).matches.truth_ignored


def test_a_threshold_takes_equal_scores_together(scene):
    errors, *_ = scene(
        [(CAT, [0, 0, 10, 10])], [(CAT, [0, 0, 10, 10], 0.5), (CAT, [50, 0, 9, 9], 0.5)]
    )
    assert best_threshold(errors) == (0.5, pytest.approx(2 / 3))


@pytest.mark.parametrize("seed", range(4))
def test_confusion_against_plain_loops(seed, tmp_path):
    rng = np.random.default_rng(seed)
    document = random_document(rng, images=12)
    results = random_results(rng, document)
    errors, truth, table = found(write(tmp_path / "t.json", document), results)
    matches = evaluate_boxes(tmp_path / "t.json", results).matches
    threshold, f1 = best_threshold(errors)
    objects = document["annotations"]

    def right_from(score):
        return sum(bool(c) and r["score"] >= score for c, r in zip(matches.correct, results,
                                                                   strict=True))  # fmt: skip

    def f1_from(score):
        wrong = sum(bool(w) and r["score"] >= score for w, r in zip(matches.wrong, results,
                                                                    strict=True))  # fmt: skip
        right = right_from(score)
        return 2 * right / (right + wrong + (~matches.truth_ignored).sum())

    assert f1 == pytest.approx(max(f1_from(row["score"]) for row in results))
    assert f1 == pytest.approx(f1_from(threshold))

    expected = np.zeros((4, 4), int)
    label = {row["id"]: k for k, row in enumerate(document["categories"])}
    free = set()
    for j, row in enumerate(objects):
        i = matches.detection[j]
        if matches.truth_ignored[j]:
            continue
        if i >= 0 and results[i]["score"] >= threshold:
            expected[label[row["category_id"]], label[row["category_id"]]] += 1
        else:
            free.add(j)
    wrong = [i for i, row in enumerate(results) if matches.wrong[i] and row["score"] >= threshold]
    for i in sorted(wrong, key=lambda i: -results[i]["score"]):
        best, chosen = 0.5, None
        for j in sorted(free):
            if objects[j]["image_id"] == results[i]["image_id"]:
                value = overlap(results[i]["bbox"], objects[j]["bbox"], False)
                if value >= best:
                    best, chosen = value, j
        row = 3 if chosen is None else label[objects[chosen]["category_id"]]
        expected[row, label[results[i]["category_id"]]] += 1
        free.discard(chosen)
    for j in free:
        expected[label[objects[j]["category_id"]], 3] += 1
    assert confusion(errors, truth, table, threshold).tolist() == expected.tolist()
    assert (expected - np.diag(np.diag(expected)))[:3, :3].any()
