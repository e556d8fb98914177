"""Metrics on result files in COCO format; no detector framework is imported here."""

from dr2net_d2.evaluation.coco import evaluate_boxes

__all__ = ["evaluate_boxes"]
