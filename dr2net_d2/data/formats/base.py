"""The interface of a dataset format, and the data that passes through it.

To add a format, derive from ``DatasetFormat`` in a module of its own and list it in
``formats/__init__.py``. Helpers are in ``reading``, ``writing`` and ``samples``; ``visdrone`` is a
short example. ``tests/data`` puts the sample of every listed format through every conversion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dr2net_d2.data.coco_tables import Row

MAX_LISTED = 20
"""Bad entries that are quoted; the rest are only counted."""


@dataclass(frozen=True)
class Layout:
    """Where the files of one split of a dataset are.

    Attributes:
        annotations: the folder of annotation files, or the annotation file.
        images: the folder that image names are relative to.
        listing: a file that lists the members of the split, where the format has one.
        split: its name, such as "train"; "" if the dataset has only one.
    """

    annotations: Path
    images: Path
    listing: Path | None = None
    split: str = ""


@dataclass
class LabelledImage:
    """One image and its annotations.

    Whatever a format records beyond COCO's keys goes into "attributes", of the image or of a row,
    so that the format's writer can restore it.

    Attributes:
        file: path of the image.
        name: its path relative to ``Layout.images``.
        width: in pixels.
        height: in pixels.
        annotations: COCO rows with "category_id", "bbox" and optionally "iscrowd", "segmentation",
            "id", "attributes", ...
        ignore_regions: rows with "bbox" and optionally "id", "attributes".
        attributes: facts about the image that COCO has no key for.
        row: further COCO keys of the image's row, such as "id".
    """

    file: Path
    name: str
    width: int
    height: int
    annotations: list[Row] = field(default_factory=list)
    ignore_regions: list[Row] = field(default_factory=list)
    attributes: Row = field(default_factory=dict)
    row: Row = field(default_factory=dict)


@dataclass
class LabelledDataset:
    """One split of a dataset, between its reader and a writer.

    Attributes:
        categories: COCO rows, by ascending id.
        count: number of images, good or bad.
        images: the good ones, usually read one at a time as they are asked for.
        info: COCO's "info".
        tables: further tables of a COCO JSON, such as "licenses".
    """

    categories: list[Row]
    count: int
    images: Iterable[LabelledImage]
    info: Row = field(default_factory=dict)
    tables: Row = field(default_factory=dict)

    def category_names(self) -> dict[int, str]:
        """Category id -> name."""
        return {row["id"]: row["name"] for row in self.categories}


@dataclass
class BadEntries:
    """Entries that cannot be used: their number, and file, line and reason of the first ones."""

    listed: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, file: Path, line: int | None, reason: object) -> None:
        """Record an entry.

        Args:
            file: the file that is at fault.
            line: its line, from 1; None if the reason concerns the whole file or names an id.
            reason: what is wrong and what to do.
        """
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            place = f"{file}:" if line is None else f"{file}:{line}:"
            self.listed.append(f"{place} {reason}")


class DatasetFormat(ABC):
    """A layout in which datasets are distributed.

    The commands call its methods in this order::

        inspect, draw, convert        find, read
        convert --to                  find, read of the source's format; write of the target's
        sample                        write_sample
        a name in DATASETS            find, read at the first use

    Attributes:
        name: what ``--format`` and ``--to`` call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def find(self, path: Path) -> dict[str, Layout]:
        """Look for datasets of this format; called for every format to find out which one fits.

        Args:
            path: an existing folder or file.

        Returns:
            The layout of each split by name; empty if the path has no dataset of this format.
        """

    @abstractmethod
    def read(self, layout: Layout, bad: BadEntries) -> LabelledDataset:
        """Open one split. Images need not be read before they are iterated over.

        Args:
            layout: a value that ``find`` returned.
            bad: collects the entries that cannot be used; they are left out of the result.

        Raises:
            DatasetError: nothing of the dataset can be used.
        """

    @abstractmethod
    def write(self, dataset: LabelledDataset, folder: Path) -> list[str]:
        """Write a dataset that any format may have read, and copies of its images.

        Args:
            dataset: its images can be iterated over once.
            folder: an empty folder.

        Returns:
            What this format cannot hold, such as "2 ignore regions".

        Raises:
            DatasetError: this format does not have one of the categories.
        """

    @abstractmethod
    def write_sample(self, folder: Path) -> None:
        """Write a small dataset that has every special case of this format.

        Args:
            folder: an empty folder.
        """
