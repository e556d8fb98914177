"""TEST.PROTOCOL selects Detectron2's own evaluator, or ours in its place."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from dr2net_d2.d2 import ProtocolEvaluator, register_dataset, run
from dr2net_d2.d2.yaml_experiment import build_evaluator
from dr2net_d2.data import resolve_dataset
from dr2net_d2.errors import ConfigError
from dr2net_d2.evaluation import PROTOCOLS, choose_protocol, evaluate_boxes
from tests.d2.tiny import arguments, tiny_cfg

NAME = "small_digits_val_n4_s64_d3"
RESULTS = Path("inference", "coco_instances_results.json")


@pytest.fixture
def json_file():
    register_dataset(NAME)
    return resolve_dataset(NAME)[0]


def detections(row, generator):
    """For each object, a good, a rough and a poor box, some mislabelled, and 40 false positives."""
    truth = torch.tensor([annotation["bbox"] for annotation in row["annotations"]])
    truth[:, 2:] += truth[:, :2]
    classes = torch.tensor([annotation["category_id"] for annotation in row["annotations"]])
    boxes, labels, scores = [], [], []
    for displacement, number in ((0.2, 1), (1.0, 1), (4.0, 1), (20.0, 40)):
        count = len(truth) * number
        noise = torch.randn(count, 4, generator=generator)
        boxes.append(truth.repeat(number, 1) + displacement * noise)
        mistaken = torch.rand(count, generator=generator) < 0.3
        labels.append((classes.repeat(number) + mistaken) % 10)
        scores.append(torch.rand(count, generator=generator))
    found = Instances((row["height"], row["width"]))
    found.pred_boxes = Boxes(torch.cat(boxes))
    found.pred_classes = torch.cat(labels)
    found.scores = torch.cat(scores)
    return found


def evaluate(evaluator, rows):
    """Evaluates detections that depend on the rows alone, not on the evaluator."""
    evaluator.reset()
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        evaluator.process([row], [{"instances": detections(row, generator)}])
    return evaluator.evaluate()["bbox"]


def test_detectron2s_evaluation_counts_like_ours(json_file, tmp_path):
    results = []
    for detections_per_image in (15, 300):
        cfg = tiny_cfg(tmp_path, "TEST.DETECTIONS_PER_IMAGE", detections_per_image)
        cfg.OUTPUT_DIR = str(tmp_path)
        evaluator = build_evaluator(cfg, NAME, "inference")
        assert type(evaluator) is COCOEvaluator
        theirs = evaluate(evaluator, DatasetCatalog.get(NAME))
        written = json.loads((tmp_path / RESULTS).read_text())
        protocol = choose_protocol("coco", detections_per_image)
        ours = evaluate_boxes(json_file, written, protocol).metrics
        assert ours == pytest.approx(theirs, nan_ok=True)
        evaluator = ProtocolEvaluator(
            NAME, output_dir=str(tmp_path / "ours"), max_dets_per_image=detections_per_image
        )
        assert evaluate(evaluator, DatasetCatalog.get(NAME)) == pytest.approx(theirs, nan_ok=True)
        assert json.loads((tmp_path / "ours" / RESULTS.name).read_text()) == written
        results.append(ours)
    assert 1 < results[0]["AP"] < results[1]["AP"] < results[1]["AP50"] < 100


@pytest.mark.parametrize("name", ["aitod", "visdrone", "tinyperson"])
def test_the_protocols_evaluate_what_detectron2_writes(name, json_file, tmp_path, caplog):
    caplog.set_level("INFO", "dr2net_d2")
    cfg = tiny_cfg(tmp_path, "OUTPUT_DIR", tmp_path)
    rows = DatasetCatalog.get(NAME)
    evaluate(build_evaluator(cfg, NAME, "inference"), rows)
    written = json.loads((tmp_path / RESULTS).read_text())

    cfg.merge_from_list(["TEST.PROTOCOL", name, "OUTPUT_DIR", str(tmp_path / name)])
    metrics = evaluate(build_evaluator(cfg, NAME, "inference"), rows)
    expected = evaluate_boxes(json_file, written, PROTOCOLS[name])
    assert metrics == pytest.approx(expected.metrics, nan_ok=True, rel=0, abs=0)
    assert json.loads((tmp_path / name / RESULTS).read_text()) == written
    saved = json.loads((tmp_path / name / "inference" / "evaluation.json").read_text())
    assert saved["protocol"] == name
    assert f"by the protocol {name} ({PROTOCOLS[name].description})" in caplog.text
    assert 1 < next(iter(metrics.values())) < 100


def test_the_detections_of_all_processes_count(json_file, monkeypatch):
    rows = DatasetCatalog.get(NAME)
    # Built as in a LazyConfig.
    lazy = L(ProtocolEvaluator)(dataset_name=NAME, protocol="aitod", output_dir=None)
    whole = evaluate(instantiate(lazy), rows)
    generator = torch.Generator().manual_seed(0)
    evaluators = [ProtocolEvaluator(NAME, "aitod") for _ in range(2)]
    for index, row in enumerate(rows):
        instances = detections(row, generator)
        evaluators[index % 2].process([row], [{"instances": instances}])
    sent = []

    def gather(data, dst):
        sent.append(data)
        return sent if len(sent) == 2 else []

    monkeypatch.setattr(comm, "gather", gather)
    monkeypatch.setattr(comm, "is_main_process", lambda: len(sent) == 2)
    assert evaluators[1].evaluate() == {}
    assert evaluators[0].evaluate()["bbox"] == pytest.approx(whole, nan_ok=True, abs=0)


def test_a_training_reports_the_protocols_metrics(tmp_path):
    options = ("TEST.PROTOCOL", "visdrone", "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    results = run(arguments(tmp_path, *options))
    assert list(results["bbox"])[:4] == ["AP", "AP50", "AP75", "AR1"]
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "DETECTIONS_PER_IMAGE is 100, but the protocol visdrone counts up to 500" in log
    assert f"Results on {NAME} by the protocol visdrone" in log


def test_what_a_protocol_cannot_evaluate_is_refused_at_the_start(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'voc'; choose one of coco, aitod"):
        run(arguments(tmp_path, "TEST.PROTOCOL", "voc"))
    register_dataset(NAME)
    cfg = tiny_cfg(tmp_path, "TEST.PROTOCOL", "aitod")
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    MetadataCatalog.get("other").set(evaluator_type="lvis")
    with pytest.raises(ConfigError, match=r"LVIS format, and TEST.PROTOCOL is 'aitod'"):
        build_evaluator(cfg, "other", "inference")
    MetadataCatalog.get("pairs").set(evaluator_type="coco")
    with pytest.raises(ConfigError, match="pairs has no JSON in COCO format"):
        build_evaluator(cfg, "pairs", "inference")
    assert not (tmp_path / "output").exists()
