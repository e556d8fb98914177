"""Evaluation protocols of the benchmarks: how detections are counted, and what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dr2net_d2.errors import ConfigError

_LARGEST = 1e10


@dataclass(frozen=True)
class SizeBin:
    """A range of areas in px², both ends included, as in COCO's evaluation."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Metric:
    """A reported number: a mean over the classes, in per cent.

    Attributes:
        name: name that it is reported under.
        kind: average precision, or the recall of all counted detections.
        iou: IoU threshold; None for the mean over all thresholds of the protocol.
        size: name of the size bin.
        max_detections: limit of the number of detections; None for the protocol's largest.
    """

    name: str
    kind: Literal["AP", "AR"] = "AP"
    iou: float | None = None
    size: str = "all"
    max_detections: int | None = None


@dataclass(frozen=True)
class Protocol:
    """The evaluation of a benchmark.

    Attributes:
        name: value of TEST.PROTOCOL.
        description: one line for logs and files.
        size_bins: the first has all sizes that the protocol evaluates.
        max_detections: limits of the number of detections, ascending; those of the highest scores
            are kept.
        iou_thresholds: ascending, 0.5 among them.
        metrics: reported metrics besides "AP-<class>"; the first is the benchmark's main one.
        per_image: whether ``max_detections`` holds for all classes of an image together, instead
            of each class in an image.
        ignore_regions: whether objects and detections at least half inside an ignore region are
            dropped.
        ignores_parts: whether an unmatched detection inside any ignored object is ignored, even
            if only this size bin ignores the object; otherwise this holds for crowds only.
        interpolation: whether precision is averaged over 101 recalls, or over all that are reached.
        recall_of_ignored: whether ignored objects count as not found in the recall.
        class_weights: whether all classes weigh the same, or by their numbers of images.
        left_out: names of classes that are not evaluated.
    """

    name: str
    description: str
    size_bins: tuple[SizeBin, ...]
    max_detections: tuple[int, ...]
    iou_thresholds: tuple[float, ...]
    metrics: tuple[Metric, ...]
    per_image: bool = False
    ignore_regions: bool = False
    ignores_parts: bool = False
    interpolation: Literal["101 points", "all points"] = "101 points"
    recall_of_ignored: bool = False
    class_weights: Literal["equal", "images"] = "equal"
    left_out: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and description, for logs."""
        return f"the protocol {self.name} ({self.description})"

    def __post_init__(self) -> None:
        if 0.5 not in self.iou_thresholds:
            raise ValueError(f"iou_thresholds is {self.iou_thresholds}; matches need 0.5 in it")


def _sides(*bins: tuple[str, float, float]) -> tuple[SizeBin, ...]:
    """Size bins by the side of a square, in pixels; infinity becomes the limit of COCO."""
    return tuple(SizeBin(name, low**2, min(high**2, _LARGEST)) for name, low, high in bins)


_INF = float("inf")
_COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
_COCO_BINS = _sides(("all", 0, _INF), ("small", 0, 32), ("medium", 32, 96), ("large", 96, _INF))
_AP = (Metric("AP"), Metric("AP50", iou=0.5), Metric("AP75", iou=0.75))


def _by_size(suffixes: dict[str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(f"AP{suffix}", size=size) for suffix, size in suffixes.items())


def _recalls(counts: Sequence[int]) -> tuple[Metric, ...]:
    return tuple(Metric(f"AR{count}", "AR", max_detections=count) for count in counts)


_TINY_SIZES = ("tiny", "tiny1", "tiny2", "tiny3", "small", "reasonable", "all")

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="coco",
            description="COCO: 100 detections per image and class, bins at 32 and 96 px",
            size_bins=_COCO_BINS,
            max_detections=(100,),
            iou_thresholds=_COCO_IOUS,
            metrics=(*_AP, *_by_size({"s": "small", "m": "medium", "l": "large"})),
        ),
        Protocol(
            name="aitod",
            description="AI-TOD: 1500 detections per image and class, bins at 8, 16 and 32 px",
            size_bins=_sides(
                ("all", 0, _INF),
                ("verytiny", 0, 8),
                ("tiny", 8, 16),
                ("small", 16, 32),
                ("medium", 32, _INF),
            ),
            max_detections=(1, 100, 1500),
            iou_thresholds=_COCO_IOUS,
            metrics=(
                *_AP,
                *_by_size({"vt": "verytiny", "t": "tiny", "s": "small", "m": "medium"}),
                *_recalls((1, 100, 1500)),
            ),
        ),
        Protocol(
            name="visdrone",
            description="VisDrone-DET toolkit: 500 detections per image over all classes, nothing "
            "in ignore regions, classes weighted by the images that have them",
            size_bins=_COCO_BINS,
            max_detections=(1, 10, 100, 500),
            iou_thresholds=_COCO_IOUS,
            metrics=(*_AP, *_recalls((1, 10, 100, 500))),
            per_image=True,
            ignore_regions=True,
            interpolation="all points",
            recall_of_ignored=True,
            class_weights="images",
            left_out=("others",),
        ),
        Protocol(
            name="tinyperson",
            description="TinyPerson: 200 detections per image and class, IoU 0.25, 0.5 and 0.75, "
            "bins at 8, 12, 20 and 32 px",
            size_bins=_sides(
                ("all", 1, _INF),
                ("tiny", 1, 20),
                ("tiny1", 1, 8),
                ("tiny2", 8, 12),
                ("tiny3", 12, 20),
                ("small", 20, 32),
                ("reasonable", 32, _INF),
            ),
            max_detections=(200,),
            iou_thresholds=(0.25, 0.5, 0.75),
            metrics=tuple(
                Metric(f"AP{round(100 * iou)}_{size}", iou=iou, size=size)
                for iou in (0.5, 0.25, 0.75)
                for size in _TINY_SIZES
            ),
            ignores_parts=True,
        ),
    )
}
"""All protocols by name; docs/evaluation.md describes them and where they come from."""


def choose_protocol(name: str, detections_per_image: int) -> Protocol:
    """Look up a protocol.

    Args:
        name: value of TEST.PROTOCOL.
        detections_per_image: limit of the protocol "coco", in place of its 100.

    Raises:
        ConfigError: if there is no protocol of that name.
    """
    if name not in PROTOCOLS:
        raise ConfigError(
            f"TEST.PROTOCOL, the evaluation's protocol, is {name!r}; choose one of "
            f"{', '.join(PROTOCOLS)}"
        )
    protocol = PROTOCOLS[name]
    if name != "coco":
        return protocol
    description = protocol.description.replace("100", str(detections_per_image), 1)
    return replace(protocol, max_detections=(detections_per_image,), description=description)
