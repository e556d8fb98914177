"""Results equal those of pycocotools bit for bit, and match by match."""

import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dr2net_d2.evaluation import PROTOCOLS, evaluate_boxes
from tests.evaluation.scenes import random_document, random_results, write

# From AI-TOD's copy of pycocotools; the defaults of pycocotools are those of COCO.
AITOD = {
    "maxDets": [1, 100, 1500],
    "areaRng": [[0, 1e10], [0, 8**2], [8**2, 16**2], [16**2, 32**2], [32**2, 1e10]],
    "areaRngLbl": ["all", "verytiny", "tiny", "small", "medium"],
}


def reference(path, results, **params):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("name", ["coco", "aitod"])
@pytest.mark.parametrize("limits", [(100,), (1, 3, 7)])
def test_arrays_and_matches_are_equal(name, limits, tmp_path):
    if name == "aitod" and limits == (100,):
        limits = (1, 100, 1500)
    protocol = replace(PROTOCOLS[name], max_detections=limits, metrics=PROTOCOLS[name].metrics[:3])
    rng = np.random.default_rng([len(name), *limits])
    checked = 0
    for _ in range(2):
        document = random_document(rng, images=150)
        results = random_results(rng, document)
        path = write(tmp_path / "truth.json", document)
        params = {} if name == "coco" else AITOD
        theirs = reference(path, results, **{**params, "maxDets": list(limits)})
        ours = evaluate_boxes(path, results, protocol)
        np.testing.assert_array_equal(ours.precision, theirs.eval["precision"])
        np.testing.assert_array_equal(ours.recall, theirs.eval["recall"])
        np.testing.assert_array_equal(ours.scores, theirs.eval["scores"])
        expected = theirs.eval["precision"][:, :, :, 0, -1]
        assert ours.metrics["AP"] == pytest.approx(100 * expected[expected > -1].mean(), abs=1e-10)
        checked += check_matches(ours.matches, document, theirs)
    assert checked > 2500


def check_matches(matches, document, theirs):
    """At IoU 0.5 and all sizes; in pycocotools the id of a result is its position + 1."""
    ids = [row["id"] for row in document["annotations"]]
    n, g = len(matches.truth), len(ids)
    found, ignored, counted = np.full(n, 0), np.zeros(n, bool), np.zeros(n, bool)
    truth_ignored, detection = np.zeros(g, bool), np.full(g, 0)
    order = {identity: position for position, identity in enumerate(ids)}
    all_sizes = [e for e in theirs.evalImgs if e and e["aRng"] == theirs.params.areaRng[0]]
    for image in all_sizes:
        rows = np.array(image["dtIds"], int) - 1
        counted[rows] = True
        found[rows], ignored[rows] = image["dtMatches"][0], image["dtIgnore"][0]
        rows = np.array([order[identity] for identity in image["gtIds"]], int)
        truth_ignored[rows], detection[rows] = image["gtIgnore"], image["gtMatches"][0]
    ours = [ids[row] if row >= 0 else 0 for row in matches.truth]
    np.testing.assert_array_equal(ours, found)
    np.testing.assert_array_equal(matches.ignored, ignored)
    np.testing.assert_array_equal(matches.counted, counted)
    np.testing.assert_array_equal(matches.truth_ignored, truth_ignored)
    # Of several detections matched with a crowd, pycocotools keeps the last, and we the best.
    single = ~truth_ignored
    np.testing.assert_array_equal((matches.detection + 1)[single], detection[single])
    np.testing.assert_array_equal(matches.detection >= 0, detection > 0)
    np.testing.assert_array_equal(matches.correct, (found > 0) & ~ignored)
    np.testing.assert_array_equal(matches.wrong, counted & (found == 0) & ~ignored)
    np.testing.assert_array_equal(matches.missed, single & (detection == 0))
    return counted.sum()


def test_the_first_annotation_may_have_id_0(tmp_path):
    """pycocotools mistakes a match with it for no match."""
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": 90, "height": 70}],
        "categories": [{"id": 1, "name": "class"}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    }
    document["annotations"][0] |= {"area": 81, "iscrowd": 0}
    results = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 1.0}]
    path = write(tmp_path / "truth.json", document)
    assert evaluate_boxes(path, results).metrics["AP"] == pytest.approx(100)
    assert reference(path, results).eval["precision"][:, :, 0, 0, -1].max() == 0
