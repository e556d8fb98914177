"""Inspect detection datasets, convert them, draw them.

    python -m dr2net_d2.data inspect visdrone_val
    python -m dr2net_d2.data convert my_yolo my_yolo.json --part train
    python -m dr2net_d2.data convert my_yolo.json my_voc --to voc
    python -m dr2net_d2.data draw my_yolo.json my_yolo.png
    python -m dr2net_d2.data sample dota dota_sample

A SOURCE is a name as in DATASETS.TRAIN, a dataset's folder, or its JSON or YAML file. Its format is
detected if only one fits. The files of a SOURCE are never changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from dr2net_d2.data import resolve_dataset
from dr2net_d2.data.coco import CocoDataset
from dr2net_d2.data.contact_sheet import contact_sheet
from dr2net_d2.data.conversion import convert_from, convert_to_coco, scratch_folder_for
from dr2net_d2.data.formats import FORMATS, BadEntries, DatasetFormat, Layout, find_layout
from dr2net_d2.data.inspection import describe, report
from dr2net_d2.data.originals import NAMES, find_original
from dr2net_d2.errors import ConfigError, DatasetError, run_command

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".jpg", ".png")
MAX_IMAGES = 400
MAX_SIDE = 4096


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dr2net_d2.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_convert, _add_draw, _add_sample):
        add(commands)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run the command that the arguments name.

    Raises:
        UserError: an option or a dataset cannot be used.
    """
    args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("dr2net_d2.data", run, parse_arguments(argv))


def open_source(
    source: str, format_name: str | None = None, split: str | None = None
) -> tuple[DatasetFormat, Layout]:
    """The format and the files of a SOURCE.

    Raises:
        DatasetError: it leads to no dataset, or to several.
    """
    if source in NAMES:
        return find_original(source)
    path = Path(source).expanduser()
    if path.exists() or format_name is not None:
        return find_layout(path, format_name, split)
    json_file, image_root = resolve_dataset(source)
    return FORMATS["coco"], Layout(json_file, image_root)


def load_source(data_format: DatasetFormat, layout: Layout) -> tuple[CocoDataset, BadEntries]:
    """A dataset without its bad entries, and these."""
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "dataset.json"
        return convert_to_coco(data_format, layout, json_file, layout.images, skip_bad=True)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a name, a folder, a JSON or YAML file")
    parser.add_argument("--format", choices=FORMATS, help="detected by default")
    parser.add_argument(
        "--part", metavar="NAME", help="train, val, ...; needed if SOURCE has more than one split"
    )


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="count images and boxes, list bad entries")
    _add_source(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    data_format, layout = open_source(args.source, args.format, args.part)
    dataset, bad = load_source(data_format, layout)
    facts = {"source": args.source, "format": data_format.name, **describe(dataset, bad)}
    print(json.dumps(facts, indent=2) if args.json else report(facts))
    if bad.count:
        raise DatasetError(f"{args.source}: {bad.count} bad entries, the first: {bad.listed[0]}")


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="write COCO-format JSON, or another format")
    _add_source(parser)
    parser.add_argument(
        "output",
        metavar="OUT",
        help="a .json file; with --to a new folder for annotations and copies of the images",
    )
    parser.add_argument("--to", choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out entries that cannot be used"
    )
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    output = Path(args.output).expanduser()
    data_format, layout = open_source(args.source, args.format, args.part)
    if args.to is not None:
        left_out, bad = convert_from(data_format, layout, FORMATS[args.to], output, args.skip_bad)
        for words in left_out:
            logger.info("%s cannot hold %s: left out", args.to, words)
        for entry in bad.listed:
            logger.info("bad entry, left out: %s", entry)
        logger.info("wrote %s, %d bad entries left out", output, bad.count)
        return
    if output.suffix != ".json":
        raise ConfigError(f"OUT is {args.output!r}; it must end with .json, or give --to FORMAT")
    if output.exists() and output.samefile(layout.annotations):
        raise ConfigError(f"OUT {args.output!r} would replace SOURCE; name another file")
    dataset, bad = convert_to_coco(data_format, layout, output, output.parent, args.skip_bad)
    print(report(describe(dataset, bad)))
    logger.info("wrote %s", output)


def _add_draw(commands: Any) -> None:
    parser = commands.add_parser("draw", help="draw images and their boxes into one picture")
    _add_source(parser)
    parser.add_argument("output", metavar="OUT", help=f"a {' or '.join(PICTURE_SUFFIXES)} file")
    parser.add_argument("--images", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument(
        "--side", type=int, default=480, metavar="PX", help="of an image, default: 480"
    )
    parser.set_defaults(run=_draw)


def _draw(args: argparse.Namespace) -> None:
    output = Path(args.output).expanduser()
    if output.suffix.lower() not in PICTURE_SUFFIXES:
        suffixes = " or ".join(PICTURE_SUFFIXES)
        raise ConfigError(f"OUT is {args.output!r}; it must end with {suffixes}")
    for option, value, maximum in (
        ("--images", args.images, MAX_IMAGES),
        ("--side", args.side, MAX_SIDE),
    ):
        if not 1 <= value <= maximum:
            raise ConfigError(f"{option} is {value}; it must be from 1 to {maximum}")
    dataset, bad = load_source(*open_source(args.source, args.format, args.part))
    picture = contact_sheet(dataset, args.images, args.side)
    with scratch_folder_for(output) as scratch:
        written = scratch / output.name
        written.write_bytes(cv2.imencode(output.suffix, picture)[1].tobytes())
        written.replace(output)
    logger.info("wrote %s, %d bad entries left out", output, bad.count)


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample", help="write a small dataset that shows a format's layout"
    )
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("output", metavar="FOLDER", help="a new folder")
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> None:
    folder = Path(args.output).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a new folder")
    with scratch_folder_for(folder) as scratch:
        written = scratch / folder.name
        written.mkdir()
        FORMATS[args.format].write_sample(written)
        written.rename(folder)
    logger.info("wrote %s", folder)
