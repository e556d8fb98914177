"""The protocols of small-object benchmarks behind Detectron2's interface of evaluators."""

from __future__ import annotations

import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm

from dr2net_d2.errors import ConfigError
from dr2net_d2.evaluation import EVALUATION_FILE, RESULTS_FILE, choose_protocol, evaluate_boxes

logger = logging.getLogger(__name__)


class ProtocolEvaluator(DatasetEvaluator):
    """Evaluates boxes by the protocol of a benchmark, in place of Detectron2's COCOEvaluator.

    In a LazyConfig: ``dataloader.evaluator = L(ProtocolEvaluator)(dataset_name=...,
    protocol="visdrone", output_dir=...)``. Masks are not evaluated.

    Args:
        dataset_name: a registered dataset in COCO format.
        protocol: a name in ``dr2net_d2.evaluation.PROTOCOLS``.
        output_dir: folder for the detections in COCO format and the evaluation; None writes none.
        distributed: gather the detections of all processes; the first process evaluates.
        max_dets_per_image: detections per image that the protocol "coco" counts; others have their
            own number.

    Raises:
        ConfigError: there is no such protocol, or the dataset has another format.
    """

    def __init__(
        self,
        dataset_name: str,
        protocol: str = "coco",
        output_dir: str | None = None,
        distributed: bool = True,
        max_dets_per_image: int = 100,
    ) -> None:
        self._protocol = choose_protocol(protocol, max_dets_per_image)
        self._name, self._output_dir, self._distributed = dataset_name, output_dir, distributed
        self._metadata = MetadataCatalog.get(dataset_name)
        self._json_file = self._metadata.get("json_file")
        if self._json_file is None:
            raise ConfigError(
                f"dataset {dataset_name} has no JSON in COCO format, which the protocol {protocol} "
                "needs; register it by one"
            )
        self.reset()

    def reset(self) -> None:
        self._results: list[dict[str, Any]] = []

    def process(
        self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Instances]]
    ) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            detections = output["instances"].to("cpu")
            boxes = Instances(
                detections.image_size,
                pred_boxes=detections.pred_boxes,
                scores=detections.scores,
                pred_classes=detections.pred_classes,
            )
            self._results += instances_to_coco_json(boxes, image["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute {"bbox": metrics} in the first process; the others return an empty dict."""
        results = self._results
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(results, dst=0)
            if not comm.is_main_process():
                return {}
            results = [*itertools.chain.from_iterable(gathered)]
        # Contiguous labels are turned back into the JSON's category ids, as in COCOEvaluator.
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        ids = {label: category_id for category_id, label in labels.items()}
        for row in results:
            row["category_id"] = ids.get(row["category_id"], row["category_id"])
        evaluation = evaluate_boxes(self._json_file, results, self._protocol)
        if self._output_dir:
            folder = Path(self._output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULTS_FILE.name).write_text(json.dumps(results))
            evaluation.save(folder / EVALUATION_FILE)
        logger.info("Boxes on %s by %s\n%s", self._name, self._protocol.title, evaluation.table())
        return OrderedDict(bbox=evaluation.metrics)
