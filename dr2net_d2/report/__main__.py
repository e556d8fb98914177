"""What does the detector get wrong? One HTML page about the results of a training.

    python -m dr2net_d2.report output/quickstart
    python -m dr2net_d2.report output/quickstart --protocol aitod
    python -m dr2net_d2.report my_report --results results.json --dataset coco_2017_val

Reads config.yaml and inference/coco_instances_results.json of the folder, which train_net.py leaves
with either engine, and evaluates them by TEST.PROTOCOL. Writes report/ into it: report.html, with
every picture inside, the pictures as PNG, and report.json with the numbers behind them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dr2net_d2.data import CocoRecord, load_coco, read_image, resolve_dataset
from dr2net_d2.errors import ConfigError, run_command
from dr2net_d2.evaluation import (
    CLASSIFICATION,
    DUPLICATE,
    KINDS,
    PROTOCOLS,
    RESULTS_FILE,
    Errors,
    Evaluation,
    GroundTruth,
    Table,
    best_threshold,
    choose_protocol,
    confusion,
    evaluate_tables,
    find_errors,
    read_results,
    read_truth,
    without_nan,
)
from dr2net_d2.evaluation import breakdowns as parts
from dr2net_d2.report.charts import DARK, LIGHT, PICTURES, draw_curves
from dr2net_d2.report.html import Picture, WorstImage, encode
from dr2net_d2.report.page import describe, write_page
from dr2net_d2.report.scenes import CROP, WHOLE, Scene, contact_sheet, draw_scene
from dr2net_d2.report.source import read_detections, recorded

logger = logging.getLogger(__name__)

FOLDER = "report"
CURVE_IOUS = (0.5, 0.75)
PAGE_BYTES = 4_000_000
"""Of whole images; the page has a third more, as text, the crops, and about 2 MB of charts."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dr2net_d2.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a training; gets report/")
    parser.add_argument(
        "--results", metavar="FILE", help=f"COCO results; OUTPUT_DIR/{RESULTS_FILE} unless given"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="that they are of; the config's test set unless given"
    )
    parser.add_argument(
        "--protocol", choices=[*PROTOCOLS], help="the config's TEST.PROTOCOL unless given"
    )
    parser.add_argument(
        "--images", type=int, default=12, metavar="N", help="worst images to show, default: 12"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Write the report that the arguments describe.

    Returns:
        The page.

    Raises:
        UserError: no results, an unknown dataset, results of another one, a folder that cannot be
            written.
    """
    if args.images < 0:
        raise ConfigError(f"--images is {args.images}; it must be 0 or more")
    output = Path(args.output_dir)
    if (output / FOLDER).exists() and not (output / FOLDER / "report.json").is_file():
        raise ConfigError(f"{output / FOLDER} exists and is no report; move it away")
    record = recorded(output, args.dataset, args.protocol)
    results_file = Path(args.results) if args.results else output / RESULTS_FILE
    json_file, image_root = resolve_dataset(record.dataset)
    dataset = load_coco(json_file, image_root)
    results = read_detections(results_file)
    protocol = choose_protocol(record.protocol, record.detections_per_image)

    logger.info("%s: %d detections on %s", results_file, len(results), record.dataset)
    truth = read_truth(json_file)
    table = read_results(results, truth)
    logger.info("evaluating by %s", protocol.title)
    evaluation = evaluate_tables(truth, table, protocol)
    logger.info("sorting errors\n%s", evaluation.table())
    errors = find_errors(truth, table, protocol)
    source = {"dataset": record.dataset, "results": str(results_file)}
    data = source | gather(evaluation, errors, truth, table)
    worst = _worst_images(errors, truth, table, data["threshold"]["score"], args.images)
    records = {record.image_id: record for record in dataset.records}
    of_worst = [records[int(truth.image_ids[image])] for image, _ in worst]
    data["worst"] = [
        {"image_id": record.image_id, "file_name": record.file_name, **numbers}
        for record, (_, numbers) in zip(of_worst, worst, strict=True)
    ]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report_", dir=output) as scratch:
            built = Path(scratch, FOLDER)
            built.mkdir()
            _write(built, data, of_worst, errors, truth, table, [i for i, _ in worst])
            _install(built, output / FOLDER)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written ({error.strerror}); free space, or give another OUTPUT_DIR"
        ) from error
    page = output / FOLDER / "report.html"
    logger.info("wrote %s", page)
    return page


def gather(
    evaluation: Evaluation, errors: Errors, truth: GroundTruth, results: Table
) -> dict[str, Any]:
    """The numbers of a report; what is not defined is None."""
    protocol = evaluation.protocol
    score, f1 = best_threshold(errors)
    at_least = errors.score >= score
    right, wrong = (int(np.count_nonzero(rows & at_least)) for rows in (errors.right, errors.wrong))
    objects = int(np.count_nonzero(errors.to_find))
    names = [truth.classes[k] for k in errors.classes]
    matrix = confusion(errors, truth, results, score)
    by_size = parts.kinds_by_side(errors, truth, results, score)
    sizes = parts.recall_by_side(errors, truth)
    found = np.sqrt(truth.objects.area[errors.to_find & (errors.found_score >= score)])
    for row in sizes:
        high = np.inf if row["high"] is None else row["high"]
        row["found_at_threshold"] = int(np.count_nonzero((found >= row["low"]) & (found < high)))
    data = {
        "protocol": {"name": protocol.name, "description": protocol.description},
        "counts": {
            "images": len(truth.image_ids),
            "objects": objects,
            "ignored objects": len(errors.to_find) - objects,
            "ignore regions": len(truth.regions) if protocol.ignore_regions else 0,
            "detections": len(errors.score),
            "not counted": int(np.count_nonzero(~errors.counted)),
        },
        "metrics": evaluation.metrics,
        "per_class": [
            {**row, **evaluation.per_class[row["class"]]}
            for row in parts.per_class(errors, truth, results, score)
        ],
        "threshold": {
            "score": score,
            "F1": f1,
            "right": right,
            "wrong": wrong,
            "precision": right / (right + wrong) if right + wrong else None,
            "recall": right / objects if objects else None,
        },
        "errors": {
            "AP50": errors.ap50,
            "kinds": _kinds(errors, by_size),
            "false positives": errors.gains["false positives"],
            "false negatives": errors.gains["false negatives"],
            "by_size": by_size,
        },
        "sizes": {"groups": sizes, "protocol": evaluation.per_size},
        "curves": {
            "recall": parts.recalls(),
            "by_iou": {
                f"{iou:g}": parts.curves_by_size(evaluation, errors.weights, iou)
                for iou in CURVE_IOUS
                if iou in protocol.iou_thresholds
            },
        },
        "confusion": {
            "classes": names,
            "matrix": matrix.tolist(),
            "largest": parts.largest_confusions(matrix, names),
        },
        "scores": parts.by_score(errors),
        "duplicates": parts.duplicate_overlaps(errors, results, score),
        "calibration": parts.calibration(errors),
        "density": parts.recall_by_density(errors, truth),
    }
    without: dict[str, Any] = without_nan(data)
    return without


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.report", run, parse_arguments(argv))


def _kinds(errors: Errors, by_size: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    numbers = [np.count_nonzero(errors.kind == place) for place in range(len(KINDS) - 1)]
    return [
        {
            "kind": kind,
            "gain": errors.gains[kind],
            "number": int(number),
            "number at threshold": sum(row["kinds"][kind] for row in by_size),
        }
        for kind, number in zip(KINDS, [*numbers, errors.missed.sum()], strict=True)
    ]


def _worst_images(
    errors: Errors, truth: GroundTruth, results: Table, score: float, most: int
) -> list[tuple[int, dict[str, int]]]:
    """Positions of images with missed objects or wrong detections, the worst first."""
    numbers = parts.per_image(errors, truth, results, score)
    total = numbers["missed"] + numbers["wrong"]
    order = np.argsort(-total, kind="stable")[:most]
    return [(i, {key: int(n[i]) for key, n in numbers.items()}) for i in order if total[i]]


def _write(
    folder: Path,
    data: dict[str, Any],
    records: Sequence[CocoRecord],
    errors: Errors,
    truth: GroundTruth,
    results: Table,
    worst: Sequence[int],
) -> None:
    charts = {**PICTURES} | {
        f"curves_iou{float(iou) * 100:.0f}": lambda data, theme, iou=iou: draw_curves(
            data, theme, iou
        )
        for iou in data["curves"]["by_iou"]
    }
    pictures: dict[str, Picture] = {}
    images, crops = [], []
    share = PAGE_BYTES // max(len(worst), 12)
    with tqdm(total=len(charts) + len(worst), desc="pictures", disable=None) as progress:
        for name, draw in charts.items():
            pictures[name] = Picture.of(draw(data, LIGHT), draw(data, DARK))
            (folder / f"{name}.png").write_bytes(pictures[name].light)
            progress.update()
        for image, record, row in zip(worst, records, data["worst"], strict=True):
            pixels = read_image(record)[..., ::-1]
            scene = make_scene(pixels, image, errors, truth, results, data["threshold"]["score"])
            row["window"] = scene.window()
            crop = draw_scene(scene, scene.window(), CROP)
            whole = draw_scene(scene, (0, 0, pixels.shape[1], pixels.shape[0]), WHOLE)
            crops.append(crop)
            images.append(WorstImage(row, encode(crop, share // 4), encode(whole, share)))
            progress.update()
    titles = [f"{Path(row['file_name']).name}\n{describe(row)}" for row in data["worst"]]
    if crops:
        contact_sheet(crops, titles).savefig(folder / "contact_sheet.png")
    Path(folder, "report.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_page(folder / "report.html", data, pictures, images)


def make_scene(
    pixels: np.ndarray,
    image: int,
    errors: Errors,
    truth: GroundTruth,
    results: Table,
    score: float,
) -> Scene:
    """What is found, missed and wrong in an image from a score on.

    Args:
        pixels: ``(H, W, 3)`` uint8, RGB.
        image: its position in the truth.
    """
    objects, names = truth.objects, truth.classes
    g = np.flatnonzero(objects.image == image)
    d = np.flatnonzero((results.image == image) & errors.wrong & (results.score >= score))
    confused, duplicate = (d[errors.kind[d] == kind] for kind in (CLASSIFICATION, DUPLICATE))
    others = np.setdiff1d(d, [*confused, *duplicate])
    hit = errors.found_score[g] >= score
    # What is taken for another class is shown by that detection.
    missed = np.setdiff1d(g[errors.to_find[g] & ~hit], errors.target[confused])
    regions = truth.regions[truth.region_image == image]

    def named(rows: np.ndarray, table: Table) -> list[str]:
        return [names[k] for k in table.category[rows].tolist()]

    mistaken = zip(named(errors.target[confused], objects), named(confused, results), strict=True)
    return Scene(
        pixels=pixels,
        boxes={
            "ignored": np.concatenate([objects.xywh[g[~errors.to_find[g]]], regions]),
            "found": objects.xywh[g[errors.to_find[g] & hit]],
            "missed": objects.xywh[missed],
            "wrong class": results.xywh[confused],
            "false positive": results.xywh[others],
            "duplicate": results.xywh[duplicate],
        },
        captions={
            "missed": named(missed, objects),
            "wrong class": [f"{one} → {other}" for one, other in mistaken],
            "false positive": named(others, results),
            "duplicate": named(duplicate, results),
        },
    )


def _install(built: Path, target: Path) -> None:
    """Put a finished report in the place of an older one."""
    if target.exists():
        target.rename(built.with_name("old"))
    built.rename(target)


if __name__ == "__main__":
    sys.exit(main())
