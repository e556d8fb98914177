import json

import cv2
import numpy as np
import pytest

from dr2net_d2.data import load_coco, make_small_digits, small_digits_from_name
from dr2net_d2.fidelity.picture import draw_fidelity
from dr2net_d2.training.pictures import draw_curves, draw_predictions, read_metrics


def test_curves_from_either_engines_metrics(tmp_path):
    rows = [
        {"iteration": 19, "total_loss": 2.0, "dr2net/alpha": 0.9, "dr2net/beta": 0.1},
        {"iteration": 39, "total_loss": 1.0, "memory/peak_mb": 900.0, "lr": 0.1},
        {"iteration": 39, "bbox/AP": float("nan"), "bbox/AP50": 20.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.json").write_text(text + '{"iteration": 59, "total_lo')
    assert len(read_metrics(tmp_path / "metrics.json")) == 3
    picture = cv2.imread(str(draw_curves(tmp_path)))
    assert draw_curves(str(tmp_path)) == tmp_path / "curves.png"
    assert picture.shape[1] > 1000
    assert picture.std() > 5


def test_the_later_line_of_a_repeated_iteration_counts(tmp_path):
    pictures = []
    for losses in ([(19, 9.0), (39, 8.0), (39, 1.0)], [(19, 9.0), (39, 1.0)]):
        rows = [{"iteration": iteration, "total_loss": loss} for iteration, loss in losses]
        (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pictures.append(cv2.imread(str(draw_curves(tmp_path))))
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("score", [0.9, 0.2])
def test_predictions_are_drawn_from_the_threshold_up(tmp_path, score):
    config = small_digits_from_name("small_digits_val_n3_s64_d3")
    json_file, images = make_small_digits(config, tmp_path)
    record = load_coco(json_file, images).records[0]
    result = {
        "image_id": record.image_id,
        "category_id": 1,
        "bbox": [8.0, 8.0, 40.0, 40.0],
        "score": score,
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps([result]))
    path = draw_predictions(json_file, images, results, tmp_path / "picture.png", num_images=2)
    picture = cv2.imread(str(path))
    half = picture.shape[1] // 2
    truth, prediction = np.array([160, 229, 0]), np.array([0, 176, 255])  # BGR
    assert (np.abs(picture[:, :half].astype(int) - truth).max(axis=2) < 30).sum() > 200
    drawn = (np.abs(picture[:, half:].astype(int) - prediction).max(axis=2) < 30).sum()
    assert (drawn > 200) == (score >= 0.5)


@pytest.mark.parametrize(
    "pairs", [[(0.9, 0.1), (0.5, 0.5)], [(1.0, 0.125), (0.8, 0.125)], [(0.0, 1.0)]], ids=str
)
def test_fidelity_has_a_row_per_model_and_takes_what_is_not_finite(tmp_path, pairs):
    def rows(floating):
        errors = {"exact": 1e-6, "float reversible": floating, "checkpointing": 0, "plain": 0}
        sizes = {"saved_bytes": 10**6, "peak_bytes": 2 * 10**9}
        return [
            {"alpha": a, "beta": b, "arm": arm, "gradient_error": error, **sizes}
            for a, b in pairs
            for arm, error in errors.items()
        ]

    one = draw_fidelity({"a": rows(1e-6)}, "float32", tmp_path / "one.png")
    two = draw_fidelity({"a": rows(None), "b": rows(1e20)}, "float64", str(tmp_path / "two.png"))
    first, second = (cv2.imread(str(path)) for path in (one, two))
    assert second.shape == (2 * first.shape[0], *first.shape[1:])
    for colour in ((178, 114, 0), (0, 94, 213)):  # exact and in floating point, BGR
        assert (np.abs(first.astype(int) - colour).max(axis=2) < 30).sum() > 200
