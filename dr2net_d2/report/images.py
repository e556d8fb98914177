"""Charts and photographs as data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A chart for light and for dark screens.

    Attributes:
        light, dark: PNG files.
        width, height: in pixels.
    """

    light: bytes
    dark: bytes
    width: int
    height: int

    @classmethod
    def of(cls, light: Figure, dark: Figure) -> Chart:
        """Render two figures of the same size."""
        width, height = light.canvas.get_width_height()
        return cls(_png(light), _png(dark), width, height)

    @property
    def light_uri(self) -> str:
        """Data URI for light screens."""
        return _uri("png", self.light)

    @property
    def dark_uri(self) -> str:
        """Data URI for dark screens."""
        return _uri("png", self.dark)


@dataclass(frozen=True)
class Photograph:
    """Pictures of one of the worst images, as data URIs.

    Attributes:
        crop: the region with most errors.
        whole: the whole image.
    """

    crop: str
    whole: str


def encode(picture: np.ndarray, limit: int) -> str:
    """Encode a picture as the data URI of a JPEG.

    Args:
        picture: ``(H, W, 3)`` uint8, RGB.
        limit: number of bytes that the quality is lowered for, down to 30 at worst.
    """
    for quality in (85, 75, 60, 45, 30):
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), options)[1]
        if len(data) <= limit:
            break
    return _uri("jpeg", data.tobytes())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
