"""Pictures, tables and numbers as HTML; all text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A chart for light and for dark screens, as PNG files; its size in px."""

    light: bytes
    dark: bytes
    width: int
    height: int

    @classmethod
    def of(cls, light: Figure, dark: Figure) -> Picture:
        width, height = light.canvas.get_width_height()
        return cls(_png(light), _png(dark), width, height)


@dataclass(frozen=True)
class WorstImage:
    """A row of report.json's "worst", its crop and the whole image as data URIs."""

    row: Mapping[str, Any]
    crop: str
    whole: str


def encode(picture: np.ndarray, most: int) -> str:
    """A picture as the data URI of a JPEG.

    Args:
        picture: ``(H, W, 3)`` uint8, RGB.
        most: bytes; quality goes down to that, within bounds.
    """
    for quality in (85, 75, 60, 45, 30):
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), options)[1]
        if len(data) <= most:
            break
    return _uri("jpeg", data.tobytes())


def figure(pictures: Mapping[str, Picture], name: str, alt: str, wide: bool = False) -> str:
    """A chart; a wide one is scrolled where there is no room."""
    picture = pictures[name]
    light, dark = (_uri("png", data) for data in (picture.light, picture.dark))
    style = ' class="wide"' if wide else ""
    return (
        f'<figure class="chart"><picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{dark}"><img{style} src="{light}" alt="{escape(alt)}" '
        f'width="{picture.width}" height="{picture.height}"></picture></figure>'
    )


def pair(*parts: str, stack: bool = False) -> str:
    """Parts beside each other where there is room, or not even there."""
    return f'<div class="{"stack" if stack else "pair"}">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """The first column and those in ``words`` are text, the others numbers."""
    columns = [' class="words"' if i in (0, *words) else "" for i in range(len(head))]
    titles = "".join(
        f"<th{column}>{escape(text)}</th>" for column, text in zip(columns, head, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(columns, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>'
        "</div>"
    )


def number(value: float | None) -> str:
    """With one decimal; a dash for None, as in the others."""
    return "–" if value is None else f"{value:.1f}"


def gain(value: float | None) -> str:
    """A number with its sign."""
    return "–" if value is None else f"+{value:.1f}"


def percent(value: float | None) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
