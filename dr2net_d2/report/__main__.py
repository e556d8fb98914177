"""Show what a trained detector gets wrong, on one HTML page.

    python -m dr2net_d2.report output/quickstart
    python -m dr2net_d2.report output/quickstart --protocol aitod
    python -m dr2net_d2.report my_report --results results.json --dataset coco_2017_val

Evaluates the detections of a training by TEST.PROTOCOL, from config.yaml and
inference/coco_instances_results.json in its output folder, which train_net.py writes with either
engine. Writes a folder report/ beside them: report.html, with all pictures inside, the charts as
PNG, and report.json with the numbers behind them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from dr2net_d2.data import CocoRecord, load_coco, read_image, resolve_dataset
from dr2net_d2.errors import ConfigError, run_command
from dr2net_d2.evaluation import (
    PROTOCOLS,
    RESULTS_FILE,
    Errors,
    GroundTruth,
    Table,
    choose_protocol,
    evaluate_tables,
    find_errors,
    read_results,
    read_truth,
)
from dr2net_d2.report.charts import charts_of
from dr2net_d2.report.content import Content, gather
from dr2net_d2.report.images import Chart, Photograph, encode
from dr2net_d2.report.json_file import to_json
from dr2net_d2.report.page import describe, write_page
from dr2net_d2.report.scenes import CROP, WHOLE, contact_sheet, draw_scene, make_scene
from dr2net_d2.report.source import read_detections, recorded
from dr2net_d2.report.theme import DARK, LIGHT

logger = logging.getLogger(__name__)

FOLDER = "report"
PAGE_BYTES = 4_000_000
"""Limit of all whole images together; base64 adds a third, and crops and charts about 2 MB."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dr2net_d2.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a training; report/ goes here")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help=f"COCO-format detections; default: OUTPUT_DIR/{RESULTS_FILE}",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="of the detections; default: the config's test set",
    )
    parser.add_argument(
        "--protocol", choices=[*PROTOCOLS], help="default: TEST.PROTOCOL of the config"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=12,
        metavar="N",
        help="worst images to show; default: 12",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Write the report that the arguments describe.

    Returns:
        Path of the page.

    Raises:
        UserError: if there are no detections, the dataset is unknown, the detections belong to
            another dataset, or the folder cannot be written.
    """
    if args.images < 0:
        raise ConfigError(f"--images is {args.images}; it must be 0 or more")
    output = Path(args.output_dir)
    if (output / FOLDER).exists() and not (output / FOLDER / "report.json").is_file():
        raise ConfigError(f"{output / FOLDER} exists and is not a report; move it away")
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
    logger.info("finding errors\n%s", evaluation.table())
    errors = find_errors(truth, table, protocol)
    records = {record.image_id: record for record in dataset.records}
    content = gather(
        evaluation,
        errors,
        truth,
        table,
        dataset=record.dataset,
        results_file=str(results_file),
        file_names={image_id: record.file_name for image_id, record in records.items()},
        worst_images=args.images,
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report_", dir=output) as scratch:
            built = Path(scratch, FOLDER)
            built.mkdir()
            _write(built, content, records, errors, truth, table)
            _install(built, output / FOLDER)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written ({error.strerror}); free space, or give another OUTPUT_DIR"
        ) from error
    page = output / FOLDER / "report.html"
    logger.info("wrote %s", page)
    return page


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.report", run, parse_arguments(argv))


def _write(
    folder: Path,
    content: Content,
    records: Mapping[int, CocoRecord],
    errors: Errors,
    truth: GroundTruth,
    results: Table,
) -> None:
    """Draw all pictures, and write everything into a folder."""
    draw_charts, charts = charts_of(content), {}
    crops, photographs, windows = [], [], []
    share = PAGE_BYTES // max(len(content.worst), 12)
    number = len(draw_charts) + len(content.worst)
    with tqdm(total=number, desc="pictures", disable=None) as progress:
        for name, draw in draw_charts.items():
            charts[name] = Chart.of(draw(content, LIGHT), draw(content, DARK))
            (folder / f"{name}.png").write_bytes(charts[name].light)
            progress.update()
        for image in content.worst:
            pixels = read_image(records[image.image_id])[..., ::-1]
            scene = make_scene(
                pixels, image.position, errors, truth, results, content.threshold.score
            )
            windows.append(scene.window())
            crops.append(draw_scene(scene, windows[-1], CROP))
            whole = draw_scene(scene, (0, 0, pixels.shape[1], pixels.shape[0]), WHOLE)
            photographs.append(Photograph(encode(crops[-1], share // 4), encode(whole, share)))
            progress.update()
    if crops:
        titles = [f"{Path(row.file_name).name}\n{describe(row)}" for row in content.worst]
        contact_sheet(crops, titles).savefig(folder / "contact_sheet.png")
    data = to_json(content, windows)
    Path(folder, "report.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_page(folder / "report.html", content, charts, photographs)


def _install(built: Path, target: Path) -> None:
    """Replace an older report by the finished one."""
    if target.exists():
        target.rename(built.with_name("old"))
    built.rename(target)


if __name__ == "__main__":
    sys.exit(main())
