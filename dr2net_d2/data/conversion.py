"""Conversion between formats. A file or folder appears complete or not at all."""

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
from dr2net_d2.data.formats import BadEntries, DatasetFormat, LabelledDataset, Layout
from dr2net_d2.errors import DatasetError

logger = logging.getLogger(__name__)


def convert_to_coco(
    data_format: DatasetFormat,
    layout: Layout,
    json_file: Path,
    image_root: Path,
    skip_bad: bool = False,
) -> tuple[CocoDataset, BadEntries]:
    """Write a dataset as COCO-format JSON; the images stay where they are.

    Facts that COCO has no key for go into "attributes" of images, annotations and "info"; regions
    without annotations go into a table "ignore_regions".

    Args:
        data_format: format of the dataset.
        layout: where its files are.
        json_file: the file to write; its folder is made if it does not exist.
        image_root: the folder that ``file_name`` in the JSON is relative to.
        skip_bad: leave out entries that cannot be used instead of refusing the dataset.

    Returns:
        The dataset as ``load_coco`` reads it from the JSON, and the entries that were left out.

    Raises:
        DatasetError: there are entries that cannot be used (the log has the first ones), no image
            or category is left, or the JSON cannot be written.
    """
    bad = BadEntries()
    with scratch_folder_for(json_file) as scratch:
        written = scratch / json_file.name
        _write_coco(data_format.read(layout, bad), written, image_root)
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
    data_format: DatasetFormat,
    layout: Layout,
    target: DatasetFormat,
    folder: Path,
    skip_bad: bool = False,
) -> tuple[list[str], BadEntries]:
    """Write a dataset in another format, with copies of its images.

    Args:
        data_format: format of the dataset.
        layout: where its files are.
        target: the format to write.
        folder: the folder to write, which must not exist.
        skip_bad: leave out entries that cannot be used instead of refusing the dataset.

    Returns:
        Phrases for what the target cannot hold, and the entries that were left out.

    Raises:
        DatasetError: there are entries that cannot be used, the folder exists or cannot be
            written, or the target does not have one of the categories.
    """
    if folder.exists():
        raise DatasetError(f"{folder}: exists already; name a new folder")
    bad = BadEntries()
    with scratch_folder_for(folder) as scratch:
        written = scratch / folder.name
        written.mkdir()
        dataset = data_format.read(layout, bad)
        left_out = target.write(replace(dataset, images=_with_progress(dataset)), written)
        if not skip_bad:
            refuse_bad(bad, layout.annotations)
        written.rename(folder)
    return left_out, bad


@contextmanager
def scratch_folder_for(target: Path) -> Iterator[Path]:
    """A temporary folder next to a file or folder, from which it is moved once it is complete.

    Raises:
        DatasetError: something inside the context cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making_", dir=target.parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise DatasetError(
            f"{target}: cannot be written ({error}); choose another folder, or for the cache"
            " set DR2NET_CACHE to a writable one"
        ) from error


def refuse_bad(bad: BadEntries, annotations: Path) -> None:
    """Log the first bad entries, if there are any, and raise a DatasetError."""
    if not bad.count:
        return
    for entry in bad.listed:
        logger.info("bad entry: %s", entry)
    rest = f" and {bad.count - 1} more" if bad.count > 1 else ""
    raise DatasetError(
        f"{annotations}: {bad.count} bad {'entry' if bad.count == 1 else 'entries'}, nothing is"
        f" written: {bad.listed[0]}{rest}; correct them, or leave them out with convert --skip-bad"
    )


def _with_progress(dataset: LabelledDataset) -> tqdm:
    return tqdm(dataset.images, total=dataset.count, unit="image", disable=None)


def _write_coco(dataset: LabelledDataset, json_file: Path, image_root: Path) -> None:
    """Write annotations as they are read, so that only the other tables are held in memory."""
    rows: list[Row] = []
    regions: list[Row] = []
    count = 0
    with open(json_file, "w", encoding="utf-8") as stream:
        stream.write('{"annotations": [')
        for image in _with_progress(dataset):
            image_id = image.row.get("id", len(rows) + 1)
            name = Path(os.path.relpath(image.file, image_root)).as_posix()
            attributes = dict(image.attributes)
            if name != image.name:
                attributes["file_name"] = image.name
            row: Row = {"id": image_id, **image.row, "file_name": name}
            row |= {"height": image.height, "width": image.width}
            if attributes:
                row["attributes"] = attributes
            rows.append(row)
            for annotation in image.annotations:
                _, _, width, height = annotation["bbox"]
                implied = {"id": count + 1, "area": width * height, "iscrowd": 0}
                own = {**implied, **annotation, "image_id": image_id}
                stream.write(",\n" if count else "\n")
                stream.write(json.dumps(own))
                count += 1
            for region in image.ignore_regions:
                regions.append({"id": len(regions) + 1, **region, "image_id": image_id})
        rest: Row = {"images": rows, "categories": dataset.categories}
        if dataset.info:
            rest["info"] = dataset.info
        if regions:
            rest["ignore_regions"] = regions
        # The opening brace has been written before the annotations.
        stream.write("],\n" + json.dumps(rest | dataset.tables).removeprefix("{"))
