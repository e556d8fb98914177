"""PhotoShapes, the second task: drawn shapes on photographs that scikit-image ships.

Nothing of it was seen in pretraining: neither the shapes nor real backgrounds. No photograph occurs
in both splits. Made anew by each process that needs it, from seeds alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import skimage.data

from dr2net_d2.data import register_coco_json, write_coco

PREFIX = "photo_shapes_"
PHOTOGRAPHS = {
    "train": ("astronaut", "coffee", "grass", "camera", "retina", "coins", "hubble_deep_field"),
    "val": ("chelsea", "rocket", "brick", "moon", "immunohistochemistry"),
}
IMAGES = {"train": 1000, "val": 300}
SIDE, OBJECTS = 128, 6
MIN_SIDE, MAX_SIDE = 12, 30
ROOM_TRIES = 20


def _turns(corners: int) -> np.ndarray:
    """Corners of a regular polygon on the unit circle, (n, 2)."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.column_stack((np.cos(angles), np.sin(angles)))


_ROUND = _turns(64)
_CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]
OUTLINES = {
    "disc": [_ROUND],
    "ring": [_ROUND, 0.55 * _ROUND],
    "triangle": [_turns(3)],
    "star": [_turns(10) * np.resize((1, 0.4), 10)[:, None]],
    "cross": [np.array([*_CROSS, *((-x, -y) for x, y in _CROSS)]) / 10**0.5],
}
"""Category -> closed polygons within the unit circle; where two lie above each other is a hole."""


def draw_shape(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Opacity in [0, 1] of a turned shape, (h, w) without margin; the longer side ``side`` px."""
    scale = 100
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    polygons = [np.rint(scale * (p @ turn.T + 1)).astype(np.int32) for p in OUTLINES[kind]]
    large = cv2.fillPoly(np.zeros((2 * scale + 1,) * 2, np.float32), polygons, 1.0)
    x, y, w, h = cv2.boundingRect((large > 0).astype(np.uint8))
    size = [max(1, round(n * side / max(w, h))) for n in (w, h)]
    return cv2.resize(large[y : y + h, x : x + w], size, interpolation=cv2.INTER_AREA)


def _background(photographs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A square of some photograph, (SIDE, SIDE, 3) float32."""
    photograph = photographs[rng.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = int(rng.integers(SIDE, min(height, width, 3 * SIDE) + 1))
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    part = photograph[y : y + side, x : x + side, :: rng.choice((-1, 1))]
    square = cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return square[:, :: rng.choice((-1, 1))].astype(np.float32)


def draw_image(
    photographs: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, (SIDE, SIDE, 3) uint8; its boxes, (n, 4) XYXY in px; their labels, (n,)."""
    image = _background(photographs, rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    taken = np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(OBJECTS // 2, OBJECTS * 3 // 2 + 1)):
        label = int(rng.integers(len(OUTLINES)))
        opacity = draw_shape(list(OUTLINES)[label], int(rng.integers(MIN_SIDE, MAX_SIDE + 1)), rng)
        h, w = opacity.shape
        for _ in range(ROOM_TRIES):
            y, x = int(rng.integers(SIDE - h + 1)), int(rng.integers(SIDE - w + 1))
            place = np.s_[y : y + h, x : x + w]
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        under = np.median(image[place], axis=(0, 1))
        # Towards the further end of the range, so that there is room for a contrast.
        contrast = np.where(under.mean() < 128, 1, -1) * rng.uniform(80, 140) + rng.uniform(
            -30, 30, 3
        )
        alpha = opacity[..., None] * rng.uniform(0.8, 1)
        image[place] = (1 - alpha) * image[place] + alpha * np.clip(under + contrast, 0, 255)
        boxes.append((x, y, x + w, y + h))
        labels.append(label)
    noisy = np.rint(image + rng.normal(0, 2, (SIDE, SIDE, 1))).clip(0, 255).astype(np.uint8)
    return noisy, np.array(boxes), np.array(labels)


def write(folder: Path, split: str, images: int, seed: int) -> tuple[Path, Path]:
    """A dataset in COCO format: its JSON and its folder of images."""
    found = [getattr(skimage.data, name)() for name in PHOTOGRAPHS[split]]
    photographs = [p if p.ndim == 3 else np.dstack([p] * 3) for p in found]
    drawn = (
        (f"{i:05d}.png", *draw_image(photographs, np.random.default_rng((seed, split == "val", i))))
        for i in range(images)
    )
    files = folder.with_suffix(".json"), folder
    write_coco(*files, drawn, list(OUTLINES))
    return files


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="photo-shapes-")


@cache
def _provide(name: str) -> None:
    split, _, seed = name.removeprefix(PREFIX).partition("_seed")
    files = write(Path(_folder().name, name), split, IMAGES[split], int(seed or 0))
    register_coco_json(name, *files)


def provide(names: Iterable[str]) -> None:
    """Make and register datasets of these names: photo_shapes_{train|val}[_seed<n>]."""
    for name in names:
        if name.startswith(PREFIX):
            _provide(name)
