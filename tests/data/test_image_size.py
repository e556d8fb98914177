"""Sizes from headers against decoded pixels."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from dr2net_d2.data import DatasetError, read_pixels
from dr2net_d2.data.image_size import SUFFIXES, image_size

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 91, 3), dtype=np.uint8)


def encoded(suffix, *options):
    return cv2.imencode(suffix, PIXELS, options)[1].tobytes()


def exif(orientation, order):
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    entries = [
        (0x010F, 2, 1, 0),
        (0x0112, 3, 1, orientation if order == "<" else orientation << 16),
    ]
    rows = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return header + struct.pack(f"{order}H", len(entries)) + rows + bytes(4)


def jpeg_with(orientation, order):
    data, body = encoded(".jpg"), b"Exif\0\0" + exif(orientation, order)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def png_with_exif(orientation):
    data, body = encoded(".png"), exif(orientation, ">")
    chunk = b"eXIf" + body
    return data[:33] + struct.pack(">I", len(body)) + chunk + struct.pack(
        ">I", zlib.crc32(chunk)
    ) + data[33:]  # fmt: skip


CASES = {
    **{suffix: encoded(suffix) for suffix in SUFFIXES},
    "progressive.jpg": encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "grey.jpg": cv2.imencode(".jpg", PIXELS[..., 0])[1].tobytes(),
    "16bit.png": cv2.imencode(".png", PIXELS.astype(np.uint16) * 256)[1].tobytes(),
    **{f"{n}{order}.jpg": jpeg_with(n, order) for n in range(1, 9) for order in "<>"},
    "exif6.png": png_with_exif(6),
    "jpeg_named.png": encoded(".jpg"),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_those_of_the_decoded_pixels(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(CASES[name])
    height, width = read_pixels(file).shape[:2]
    assert image_size(file) == (width, height)
    assert {width, height} == {37, 91}


def test_some_cases_are_turned(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg_with(6, "<"))
    assert image_size(tmp_path / "a.jpg") == (37, 91)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pixels_are_not_needed(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(encoded(suffix)[:700])
    assert image_size(file) == (91, 37)


@pytest.mark.parametrize("data", [b"", b"GIF89a", encoded(".jpg")[:9], encoded(".png")[:20]])
def test_what_has_no_size_is_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DatasetError, match="not a readable image"):
        image_size(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="No such file"):
        image_size(tmp_path / "b.png")
