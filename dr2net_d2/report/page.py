"""The page of a report: page.html filled with its numbers and pictures, as one offline file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dr2net_d2.report.content import Content, KindResult, Totals, WorstImage
from dr2net_d2.report.images import Chart, Photograph
from dr2net_d2.report.scenes import STYLES

_CSS_LINES = {"-": "solid", "--": "dashed", "-.": "dashed", ":": "dotted"}
_LEGEND = {
    "missed": "missed object",
    "wrong class": "wrong class (object → detected as)",
    "false positive": "other false positive",
}


@dataclass(frozen=True)
class MostMissed:
    """The size group with the most missed objects.

    Attributes:
        range: bounds of the side in pixels, as text.
        missed: number of missed objects of the group.
        total: number of missed objects of all groups.
        share: ``missed / total``.
    """

    range: str
    missed: int
    total: int
    share: float


def write_page(
    path: Path,
    content: Content,
    charts: Mapping[str, Chart],
    photographs: Sequence[Photograph],
) -> None:
    """Write report.html.

    Args:
        path: file to write.
        content: numbers of the report.
        charts: name -> chart.
        photographs: one of each of ``content.worst``.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        basename=lambda name: Path(name).name,
        describe=describe,
        gain=format_gain,
        integer="{:,}".format,
        number=format_number,
        percent=format_percent,
    )
    text = environment.get_template("page.html").render(
        content=content,
        charts=charts,
        photographs=[*zip(content.worst, photographs, strict=True)],
        metrics=_headline(content),
        totals=_describe_totals(content.totals),
        by_gain=_by_gain(content),
        most_missed=_most_missed(content),
        one_size_bin=sum(row.objects > 0 for row in content.size_bins.values()) <= 2,
        close_duplicates=_removed_at(content, 0.5),
        legend=[
            (_LEGEND.get(name, name), _CSS_LINES[line], colour)
            for name, (colour, line, _) in STYLES.items()
        ],
    )
    path.write_text(text, encoding="utf-8")


def describe(image: WorstImage) -> str:
    """Describe the errors of one of the worst images."""
    notes = [
        f"{number:,} {words}"
        for number, words in (
            (image.wrong_class, "of the wrong class"),
            (image.duplicates, "duplicates"),
        )
        if number
    ]
    text = f"{image.missed:,} missed, {image.wrong:,} wrong"
    return f"{text} ({', '.join(notes)})" if notes else text


def format_number(value: float) -> str:
    """Format with one decimal; NaN, as in the other formats, is a dash."""
    return "–" if math.isnan(value) else f"{value:.1f}"


def format_gain(value: float) -> str:
    """Format with a sign and one decimal."""
    return "–" if math.isnan(value) else f"+{value:.1f}"


def format_percent(share: float) -> str:
    """Format a share in per cent, with one decimal."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _headline(content: Content) -> dict[str, float]:
    """The protocol's own metrics."""
    return {metric.name: content.metrics[metric.name] for metric in content.protocol.metrics}


def _describe_totals(totals: Totals) -> str:
    """List the totals, without the less important ones that are 0."""
    numbers = {
        "images": totals.images,
        "objects": totals.objects,
        "ignored objects": totals.ignored_objects,
        "ignore regions": totals.ignore_regions,
        "detections": totals.detections,
        "not counted": totals.not_counted,
    }
    return " · ".join(
        f"{number:,} {name}"
        for name, number in numbers.items()
        if number or name in ("images", "objects", "detections")
    )


def _by_gain(content: Content) -> list[KindResult]:
    """Kinds of errors by descending gain; none if the gains are undefined."""
    defined = [row for row in content.kinds if not math.isnan(row.gain)]
    return sorted(defined, key=lambda row: -row.gain)


def _most_missed(content: Content) -> MostMissed | None:
    groups = [group for group in content.sizes if group.objects]
    if not groups:
        return None
    missed = [group.objects - group.matched_at_threshold for group in groups]
    index = max(range(len(groups)), key=missed.__getitem__)
    group, total = groups[index], sum(missed)
    high = " or more" if math.isinf(group.high) else f" to {group.high}"
    return MostMissed(
        range=f"{group.low}{high}",
        missed=missed[index],
        total=total,
        share=missed[index] / total if total else 0,
    )


def _removed_at(content: Content, iou: float) -> float:
    """Share of the duplicates that overlap the better detection by an IoU or more."""
    duplicates = content.duplicates
    bounds = zip(duplicates.iou, duplicates.removed, strict=True)
    return next(share for bound, share in bounds if math.isclose(bound, iou))
