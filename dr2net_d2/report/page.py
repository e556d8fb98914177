"""The page of a report: one HTML file with everything inside, for any browser, phone or printer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dr2net_d2.report.html import Picture, WorstImage, figure, gain, number, pair, percent, table
from dr2net_d2.report.scenes import STYLES
from dr2net_d2.report.style import STYLE

Data = Mapping[str, Any]


def describe(row: Data) -> str:
    """A row of report.json's "worst" in words."""
    notes = [
        f"{row[key]:,} {words}"
        for key, words in (("wrong class", "by their class"), ("duplicates", "duplicates"))
        if row[key]
    ]
    text = f"{row['missed']:,} missed, {row['wrong']:,} wrong"
    return f"{text} ({', '.join(notes)})" if notes else text


def write_page(
    path: Path, data: Data, pictures: Mapping[str, Picture], worst: Sequence[WorstImage]
) -> None:
    """Write report.html.

    Args:
        path: of the page.
        data: of report.json.
        pictures: the charts by name.
        worst: images, as many as there are to be shown.
    """
    title = f"Report: {data['dataset']}"
    sections = [
        _headline(data),
        _limits(data, pictures),
        _sizes(data, pictures),
        _curves(data, pictures),
        _confusion(data, pictures),
        _duplicates(data, pictures),
        _scores(data, pictures),
        _worst(data, worst),
    ]
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{text}</h2>{content}</section>'
        for name, text, content in sections
    )
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style></head>
<body><header><h1>{escape(data["dataset"])}</h1>
<p>{escape(data["results"])}<br>
protocol <b>{escape(data["protocol"]["name"])}</b>: {escape(data["protocol"]["description"])}</p>
</header><nav>{links}</nav><main>{body}</main>
<footer>Written by <code>python -m dr2net_d2.report</code>; the numbers behind every picture are in
report.json beside this page.</footer></body></html>
""",
        encoding="utf-8",
    )


Section = tuple[str, str, str]


def _headline(data: Data) -> Section:
    main, *others = data["metrics"].items()
    listed = [(name, value) for name, value in others if not name.startswith("AP-")]
    tiles = "".join(
        f'<div class="tile{" main" if name == main[0] else ""}"><span>{escape(name)}</span>'
        f"<b>{number(value)}</b></div>"
        for name, value in [main, *listed]
    )
    always = ("images", "objects", "detections")
    counts = " · ".join(
        f"{value:,} {name}" for name, value in data["counts"].items() if value or name in always
    )
    best = data["threshold"]
    text = (
        f"<p class=counts>{escape(counts)}</p><p>At the score of the best F1, "
        f"<b>{best['score']:.2f}</b>, {best['right']:,} detections are right and "
        f"{best['wrong']:,} wrong: precision {percent(best['precision'])}, recall "
        f"{percent(best['recall'])}, F1 {percent(best['F1'])}. Where this page speaks of "
        "<i>the threshold</i>, it is this score.</p>"
    )
    head = ("class", "objects", "AP", "AP50", "AR", "found", "missed", "wrong", "precision",
            "recall")  # fmt: skip
    rows = [
        (
            row["class"],
            f"{row['objects']:,}",
            *(number(row[name]) for name in ("AP", "AP50", "AR")),
            *(f"{row[name]:,}" for name in ("found", "missed", "wrong")),
            *(percent(row[name]) for name in ("precision", "recall")),
        )
        for row in data["per_class"]
    ]
    note = "<p class=note>Found, missed, wrong, precision and recall at the threshold, IoU 0.5.</p>"
    classes = table(head, rows) + note
    if len(rows) > 20:
        classes = f"<details><summary>All {len(rows)} classes</summary>{classes}</details>"
    return "metrics", "Metrics", f'<div class="tiles">{tiles}</div>{text}{classes}'


_MEANING = {
    "classification": (
        "IoU of at least 0.5 with an object of another class",
        "classes that look alike: more resolution, more examples, or one class",
    ),
    "localisation": (
        "IoU of 0.1 to 0.5 with an object of its class",
        "box regression: a finer feature level, smaller anchors, larger images",
    ),
    "both": (
        "neither: IoU of 0.1 to 0.5 with an object of another class",
        "as the two before",
    ),
    "duplicate": (
        "IoU above 0.5 with an object of its class that a better detection has",
        "suppression at a lower IoU, tiles that overlap less",
    ),
    "background": (
        "IoU of at most 0.1 with every object",
        "hard backgrounds in training; objects that are not annotated",
    ),
    "missed": (
        "an object that nothing finds and no error of the first two kinds points to",
        "larger images or tiles, smaller anchors, more proposals",
    ),
}


def _limits(data: Data, pictures: Mapping[str, Picture]) -> Section:
    errors = data["errors"]
    rows = [
        (
            row["kind"],
            _MEANING[row["kind"]][0],
            f"{row['number']:,}",
            f"{row['number at threshold']:,}",
            gain(row["gain"]),
            _MEANING[row["kind"]][1],
        )
        for row in errors["kinds"]
    ]
    gains = [row for row in errors["kinds"] if row["gain"] is not None]
    finding = "Nothing is to be found in this dataset."
    if gains:
        first, second, *_ = sorted(gains, key=lambda row: -row["gain"])
        finding = (
            f"From an AP50 of <b>{number(errors['AP50'])}</b>, mending every <b>{first['kind']}"
            f"</b> error would gain most: {gain(first['gain'])}. Next is {second['kind']}: "
            f"{gain(second['gain'])}."
        )
    return (
        "limits",
        "What limits AP",
        f"<p class=finding>{finding}</p>"
        + pair(
            figure(pictures, "limits", "gain by kind of error"),
            figure(pictures, "kinds_by_size", "number of errors of each kind by size"),
        )
        + table(
            ("kind", "what it is", "all", "at the threshold", "AP50 gained", "look at"),
            rows,
            words=(1, 5),
        )
        + "<p class=note>Kinds of false positives as in TIDE (arXiv 2008.08115), the first of "
        "localisation, classification, duplicate, background and both that holds. Mended: a "
        "localisation or classification error gets the box or class of the object it points to, "
        "once per object, and goes if that object is found; duplicates, background and both go; "
        "missed objects no longer count. At the threshold, an object is missed that no detection "
        "from there on finds or points to. Ignored objects and regions are no errors.</p>"
        "<p class=note>Gains do not add up: without any false positive AP50 would gain "
        f"{gain(errors['false positives'])}, without any object that is not found "
        f"{gain(errors['false negatives'])}. All this is at IoU 0.5; what tighter boxes could "
        "bring shows in AP against AP50.</p>",
    )


def _sizes(data: Data, pictures: Mapping[str, Picture]) -> Section:
    groups = [row for row in data["sizes"]["groups"] if row["objects"]]
    finding = ""
    if groups:
        missed = [row["objects"] - row["found_at_threshold"] for row in groups]
        worst = max(range(len(groups)), key=missed.__getitem__)
        row, total = groups[worst], sum(missed)
        high = f" to {row['high']}" if row["high"] is not None else " or more"
        finding = (
            f"<p class=finding>Of {total:,} objects missed at the threshold, {missed[worst]:,} "
            f"({percent(missed[worst] / total if total else 0)}) are {row['low']}{high} px a side."
            "</p>"
        )
    bins = table(
        ("size bin of the protocol", "objects", "images", "AP", "AP50", "AR"),
        [
            (name, f"{row['objects']:,}", f"{row['images']:,}",
             *(number(row[key]) for key in ("AP", "AP50", "AR")))
            for name, row in data["sizes"]["protocol"].items()
        ],
    )  # fmt: skip
    inhabited = [name for name, row in data["sizes"]["protocol"].items() if row["objects"]]
    hint = ""
    if len(inhabited) <= 2 and data["protocol"]["name"] == "coco":
        hint = (
            "<p class=note>All objects lie in one bin of this protocol; "
            "<code>--protocol aitod</code> has finer ones.</p>"
        )
    note = (
        "<p class=note>A side is the root of the annotated area. Objects found with a score below "
        "the threshold can be had by lowering it, at the cost of precision; those not found at all "
        "cannot.</p>"
    )
    charts = pair(
        figure(pictures, "missed_by_size", "found and missed objects by size"),
        figure(pictures, "recall_by_size", "recall by size at several scores"),
    )
    return "sizes", "Missed objects by size", f"{finding}{charts}{note}{bins}{hint}"


def _curves(data: Data, pictures: Mapping[str, Picture]) -> Section:
    names = [name for name in pictures if name.startswith("curves_")]
    figures = [figure(pictures, name, "precision over recall by size") for name in names]
    note = (
        "<p class=note>Means over the classes. A curve that ends early lacks detections, one that "
        "falls early has wrong ones with high scores; one that is good at IoU 0.5 only has boxes "
        "that are too far off.</p>"
    )
    return "curves", "Precision and recall", pair(*figures) + note


def _confusion(data: Data, pictures: Mapping[str, Picture]) -> Section:
    content = data["confusion"]
    many = len(content["classes"]) > 24
    chart = figure(pictures, "confusion", "confusion matrix", wide=many)
    rows = [
        (row["object"], row["detected as"], f"{row['number']:,}", percent(row["share"]))
        for row in content["largest"][: None if many else 12]
    ]
    largest = "<p>No class is taken for another.</p>"
    if rows:
        head = ("object", "detected as", "number", "of its objects")
        largest = f"<div><h3>Largest confusions</h3>{table(head, rows, words=(1,))}</div>"
    note = (
        "<p class=note>Detections from the threshold on, at IoU 0.5. A row is 100 % of the objects "
        "of a class; the last column has those that are missed. The last row has detections "
        "without an object, duplicates among them, as shares of all of those. A dot is below "
        "0.5 %.</p>"
    )
    return "confusion", "Confusion of classes", pair(chart, largest, stack=many) + note


def _duplicates(data: Data, pictures: Mapping[str, Picture]) -> Section:
    content = data["duplicates"]
    at_half = dict(zip((f"{iou:.2f}" for iou in content["iou"]), content["removed"], strict=True))
    finding = f"<p class=finding>{content['duplicates']:,} duplicates at the threshold"
    if content["duplicates"]:
        finding += (
            f", on {content['objects']:,} objects; {percent(at_half['0.50'])} of them overlap the "
            "better detection by an IoU of 0.5 or more"
        )
    charts = pair(
        figure(pictures, "scores", "detections by score"),
        figure(pictures, "suppression", "duplicates by their overlap with the better detection"),
    )
    note = (
        "<p class=note>A duplicate hits an object that a better detection of the class has. Read "
        "the right chart from right to left: suppression at an IoU removes what lies to its right. "
        "Neighbouring objects that overlap as much would go, too.</p>"
    )
    return "duplicates", "Duplicates", f"{finding}.</p>{charts}{note}"


def _scores(data: Data, pictures: Mapping[str, Picture]) -> Section:
    charts = pair(
        figure(pictures, "calibration", "precision by score"),
        figure(pictures, "recall_by_density", "recall by the number of objects of an image"),
    )
    note = (
        "<p class=note>Left: bars below the diagonal are scores that promise too much, bars above "
        "it too little. Right: if recall falls in crowded images, look at detections per image, "
        "proposals and suppression.</p>"
    )
    return "scores", "Scores and density", charts + note


def _worst(data: Data, worst: Sequence[WorstImage]) -> Section:
    if not worst:
        return (
            "worst",
            "Worst images",
            "<p>None: nothing is missed or wrong, or none asked for.</p>",
        )
    names = {
        "missed": "missed object",
        "wrong class": "wrong class (object → detected as)",
        "false positive": "other false positive",
    }
    legend = "".join(
        f'<span><i style="border:2px {_CSS_LINES[line]} {colour}"></i>{names.get(name, name)}'
        "</span>"
        for name, (colour, line, _) in STYLES.items()
    )
    cards, full = [], []
    for place, image in enumerate(worst):
        row = image.row
        name = escape(Path(row["file_name"]).name)
        text = describe(row)
        cards.append(
            f'<figure><a href="#image{place}" title="the whole image"><img src="{image.crop}" '
            f'alt="worst region of {name}"></a><figcaption><b>{name}</b><br>{text}</figcaption>'
            "</figure>"
        )
        full.append(
            f'<div class="full" id="image{place}"><p><a href="#worst">✕ Back</a> {name}: {text}'
            f'</p><div><img src="{image.whole}" alt="{name}"></div></div>'
        )
    return (
        "worst",
        "Worst images",
        "<p>Images with the most missed objects and wrong detections at the threshold, each where "
        f"they are densest. Click one for the whole image.</p><p class=legend>{legend}</p>"
        f'<div class="sheet">{"".join(cards)}</div>{"".join(full)}',
    )


_CSS_LINES = {"-": "solid", "--": "dashed", "-.": "dashed", ":": "dotted"}
