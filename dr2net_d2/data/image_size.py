"""The size of an image, from the file's header if possible."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from dr2net_d2.data.coco import read_pixels

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers whose segment has the size of the image."""


def image_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels, after the EXIF rotation, as ``read_pixels`` applies it.

    For PNG and JPEG only the header is read, so the pixels may still be damaged.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start == b"\x89PNG\r\n\x1a\n":
                return _png_size(stream)
            if start[:2] == b"\xff\xd8":
                stream.seek(2)
                return _jpeg_size(stream)
    except (OSError, ValueError, struct.error):
        pass
    height, width = read_pixels(file).shape[:2]
    return width, height


def _png_size(stream: BinaryIO) -> tuple[int, int]:
    """Read behind the signature; a ValueError means that the pixels have to be decoded."""
    size = None
    while True:
        length, kind = struct.unpack(">I4s", stream.read(8))
        if kind == b"IHDR":
            size = struct.unpack(">II", stream.read(8))
            length -= 8
        elif kind == b"IDAT" and size is not None and min(size) > 0:
            return size
        elif kind in (b"eXIf", b"IDAT"):
            raise ValueError
        stream.seek(length + 4, os.SEEK_CUR)


def _jpeg_size(stream: BinaryIO) -> tuple[int, int]:
    """Read behind the start marker; a ValueError or struct.error means that the file is damaged."""
    turned = False
    while True:
        mark, kind, length = struct.unpack(">BBH", stream.read(4))
        if mark != 0xFF:
            raise ValueError
        body = stream.read(length - 2)
        if kind == 0xE1 and body.startswith(b"Exif\0\0"):
            turned = _orientation(body[6:]) >= 5
        elif kind in _FRAMES:
            height, width = struct.unpack(">HH", body[1:5])
            if not (height and width):
                raise ValueError
            return (height, width) if turned else (width, height)


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 (upright) to 8; 5 and above swap width and height."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for index in range(count):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * index)
        if tag == 0x0112:
            return int(value)
    return 1
