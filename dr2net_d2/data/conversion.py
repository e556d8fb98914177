"""From any format to COCO-format JSON and back; a file or folder appears whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from dr2net_d2.data.coco import CocoDataset, load_coco
from dr2net_d2.data.coco_tables import Row
from dr2net_d2.data.formats import BadEntries, Format, Layout, Source
from dr2net_d2.errors import DatasetError

logger = logging.getLogger(__name__)


def convert_to_coco(
    data_format: Format,
    layout: Layout,
    json_file: Path,
    image_root: Path,
    skip_bad: bool = False,
) -> tuple[CocoDataset, BadEntries]:
    """Write a dataset as COCO-format JSON; the images stay where they are.

    What COCO has no key for is in "attributes" of images, annotations and "info"; regions in which
    nothing is annotated are in a table "ignore_regions".

    Args:
        data_format: the dataset's.
        layout: where it lies.
        json_file: what to write; its folder is made.
        image_root: what the JSON's ``file_name`` values are to be relative to.
        skip_bad: leave out entries that cannot be used instead of refusing the dataset.

    Returns:
        What was written, as ``load_coco`` reads it, and the entries that were left out.

    Raises:
        DatasetError: entries that cannot be used, the first ones in the log; or nothing is left;
            or the JSON cannot be written.
    """
    bad = BadEntries()
    with aside(json_file) as scratch:
        written = scratch / json_file.name
        source = data_format.read(layout, bad)
        _write_coco(source, written, image_root)
        if not skip_bad:
            refuse_bad(bad, layout.annotations)
        try:
            dataset = load_coco(written, image_root)
        except DatasetError as error:
            problem = str(error).removeprefix(f"{written}: ")
            raise DatasetError(f"{layout.annotations}: {problem}") from None
        written.replace(json_file)
    return dataset, bad


def convert_from(
    data_format: Format, layout: Layout, target: Format, folder: Path, skip_bad: bool = False
) -> tuple[list[str], BadEntries]:
    """Write a dataset in another format, its images copied.

    Args:
        data_format: the dataset's.
        layout: where it lies.
        target: the other format.
        folder: a new one.
        skip_bad: as for ``convert_to_coco``.

    Returns:
        What the other format cannot hold, in words, and the entries that were left out.

    Raises:
        DatasetError: as for ``convert_to_coco``; the folder exists; a category that the other
            format does not have.
    """
    if folder.exists():
        raise DatasetError(f"{folder}: exists already; name a new folder")
    bad = BadEntries()
    with aside(folder) as scratch:
        written = scratch / folder.name
        written.mkdir()
        source = data_format.read(layout, bad)
        left_out = target.write(replace(source, images=_progress(source)), written)
        if not skip_bad:
            refuse_bad(bad, layout.annotations)
        written.rename(folder)
    return left_out, bad


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder beside a file or folder that is to be moved there when it is complete.

    Raises:
        DatasetError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making_", dir=target.parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise DatasetError(
            f"{target}: cannot be written ({error}); choose another place, or for the cache set"
            " DR2NET_CACHE to a writable folder"
        ) from error


def refuse_bad(bad: BadEntries, annotations: Path) -> None:
    """Log the first bad entries and raise a DatasetError, if there are any."""
    if not bad.count:
        return
    for entry in bad.listed:
        logger.info("bad entry: %s", entry)
    rest = f" and {bad.count - 1} more" if bad.count > 1 else ""
    raise DatasetError(
        f"{annotations}: {bad.count} bad {'entry' if bad.count == 1 else 'entries'}, nothing is"
        f" written: {bad.listed[0]}{rest}; correct them, or leave them out by convert --skip-bad"
    )


def _progress(source: Source) -> tqdm:
    return tqdm(source.images, total=source.count, unit="image", disable=None)


def _write_coco(source: Source, json_file: Path, image_root: Path) -> None:
    """Annotations are written as they come; only images and ignore regions are kept until then."""
    rows: list[Row] = []
    regions: list[Row] = []
    count = 0
    with open(json_file, "w", encoding="utf-8") as stream:
        stream.write('{"annotations": [')
        for image in _progress(source):
            image_id = image.row.get("id", len(rows) + 1)
            name = Path(os.path.relpath(image.file, image_root)).as_posix()
            attributes = dict(image.attributes)
            if name != image.name:
                attributes["file_name"] = image.name
            row: Row = {"id": image_id, **image.row, "file_name": name}
            row |= {"height": image.height, "width": image.width}
            rows.append(row | ({"attributes": attributes} if attributes else {}))
            for annotation in image.annotations:
                _, _, width, height = annotation["bbox"]
                implied = {"id": count + 1, "area": width * height, "iscrowd": 0}
                own = {**implied, **annotation, "image_id": image_id}
                stream.write(("," if count else "") + "\n" + json.dumps(own))
                count += 1
            for region in image.ignore_regions:
                regions.append({"id": len(regions) + 1, **region, "image_id": image_id})
        rest: Row = {"images": rows, "categories": source.categories}
        rest |= {"info": source.info} if source.info else {}
        rest |= {"ignore_regions": regions} if regions else {}
        stream.write("],\n" + json.dumps(rest | source.tables)[1:])
