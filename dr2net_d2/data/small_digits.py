"""SmallDigits: a dataset of small objects that needs no download.

scikit-learn's handwritten digits, 8 to 28 px large, on textured and cluttered canvases in COCO
format. Canvases do not depend on num_images: a larger dataset starts with those of a smaller one.
"""

import hashlib
import json
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dr2net_d2.data.coco_writer import write_coco
from dr2net_d2.data.folders import cache_folder
from dr2net_d2.errors import DatasetError

# Increase it whenever canvases change, so that older ones in a cache are not reused.
_VERSION = 2
_SPLITS = ("train", "val")
_DEFAULT_IMAGES = {"train": 400, "val": 100}
_MAX_SIZE = 4096
_NAME = "small_digits_{train|val}[_n<images>][_s<size>|_s<height>x<width>][_d<objects>]"
_NAME += "[_min<px>][_max<px>][_seed<seed>]"
_TOKEN = re.compile(r"(n|s|d|min|max|seed)(\d+)(?:x(\d+))?")
_FIELDS = {"n": "num_images", "s": "size", "d": "objects", "min": "min_side", "max": "max_side"}
_PLACEMENT_ROUNDS = 10
_MAX_OVERLAP = 0.1
_MIN_ALPHA = 0.15


@dataclass(frozen=True)
class SmallDigitsConfig:
    """The contents of a SmallDigits dataset.

    Attributes:
        split: "train" or "val"; no digit sample occurs in both.
        num_images: number of canvases; None means 400 for "train" and 100 for "val".
        size: side of the canvases, or (height, width), in pixels, up to 4096.
        objects: mean number of digits per canvas. A canvas gets 0.5 to 1.5 times as many, or fewer
            if there is no room.
        min_side: minimum of a digit's longer side, in pixels.
        max_side: maximum of a digit's longer side, in pixels.
        seed: seed of all canvases.

    Raises:
        ValueError: a value is not allowed.
    """

    split: str
    num_images: int | None = None
    size: int | tuple[int, int] = 256
    objects: int = 12
    min_side: int = 8
    max_side: int = 28
    seed: int = 0

    def __post_init__(self) -> None:
        _check("split", self.split, _SPLITS)
        if self.num_images is None:
            object.__setattr__(self, "num_images", _DEFAULT_IMAGES[self.split])
        _check("num_images", self.num_images, range(1, 1_000_001))
        _check("objects", self.objects, range(1, 100_001))
        _check("seed", self.seed, range(2**63))
        _check("max_side", self.max_side, range(4, _MAX_SIZE // 2 + 1))
        _check("min_side", self.min_side, range(4, self.max_side + 1))
        if len(self.shape) != 2:
            raise ValueError(f"size is {self.size!r}; give a side or (height, width) in pixels")
        for side in self.shape:
            _check("size", side, range(2 * self.max_side, _MAX_SIZE + 1))

    @property
    def shape(self) -> tuple[int, int]:
        """Canvas height and width in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def name(self) -> str:
        """The name with all values, as ``small_digits_from_name`` reads it."""
        height, width = self.shape
        return (
            f"small_digits_{self.split}_n{self.num_images}_s{height}x{width}_d{self.objects}"
            f"_min{self.min_side}_max{self.max_side}_seed{self.seed}"
        )


def small_digits_from_name(name: str) -> SmallDigitsConfig:
    """Parse a dataset name such as "small_digits_train" or "small_digits_val_n64_s512_d40_seed3".

    Raises:
        DatasetError: the name has another form, or a value is not allowed.
    """
    prefix, _, rest = name.partition("small_digits_")
    split, *tokens = rest.split("_")
    if prefix or split not in _SPLITS:
        raise DatasetError(f"dataset {name!r} is not known; write {_NAME}")
    values: dict[str, Any] = {}
    for token in tokens:
        match = _TOKEN.fullmatch(token)
        field = _FIELDS.get(match[1], match[1]) if match else ""
        if not match or field in values or (match[3] and field != "size"):
            raise DatasetError(f"dataset {name!r}: {token!r} is not understood; write {_NAME}")
        values[field] = (int(match[2]), int(match[3])) if match[3] else int(match[2])
    try:
        return SmallDigitsConfig(split, **values)
    except ValueError as error:
        raise DatasetError(f"dataset {name!r}: {error}") from None


@lru_cache
def digit_samples(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of a split: every fifth of each class is "val", the rest is "train".

    Returns:
        Ink in [0, 1], ``(n, 8, 8)`` float32, and labels, ``(n,)`` int64. Both are read-only.

    Raises:
        ValueError: the split is unknown.
    """
    _check("split", split, _SPLITS)
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    digits = load_digits()
    rank = [(digits.target[:i] == label).sum() for i, label in enumerate(digits.target)]
    chosen = (np.array(rank) % 5 == 4) == (split == "val")
    images = (digits.images[chosen] / 16).astype(np.float32)
    labels = digits.target[chosen].astype(np.int64)
    for array in (images, labels):
        array.setflags(write=False)
    return images, labels


def draw_canvas(
    config: SmallDigitsConfig, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Draw one canvas; the same arguments give the same pixels.

    Returns:
        The image, ``(height, width, 3)`` uint8 BGR; tight boxes around the ink, ``(n, 4)`` float32
        XYXY in pixels; labels, ``(n,)`` int64, 0 to 9; n masks, ``(h, w)`` bool, true where a digit
        has ink in its box.
    """
    rng = np.random.default_rng((config.seed, _SPLITS.index(config.split), index))
    background = _draw_background(config.shape, rng)
    samples, sample_labels = digit_samples(config.split)
    image = background.copy()
    count = int(rng.integers((config.objects + 1) // 2, config.objects * 3 // 2 + 1))
    boxes = np.zeros((count, 4), dtype=np.float32)
    labels = np.zeros(count, dtype=np.int64)
    masks: list[np.ndarray] = []
    placed = 0
    for _ in range(count):
        sample = int(rng.integers(len(samples)))
        side = int(rng.integers(config.min_side, config.max_side + 1))
        alpha = _ink(samples[sample], side, rng)[..., None]
        box = _find_room(config.shape, alpha.shape[:2], boxes[:placed], rng)
        if box is None:
            continue
        x0, y0, x1, y1 = box
        under = background[y0:y1, x0:x1].astype(np.float32)
        blend = image[y0:y1, x0:x1] * (1 - alpha) + alpha * _ink_colour(under, rng)
        image[y0:y1, x0:x1] = np.rint(blend).astype(np.uint8)
        boxes[placed], labels[placed] = box, sample_labels[sample]
        masks.append(alpha[..., 0] > 0)
        placed += 1
    return image, boxes[:placed], labels[:placed], masks


def make_small_digits(
    config: SmallDigitsConfig, cache_dir: str | Path | None = None
) -> tuple[Path, Path]:
    """Draw a SmallDigits dataset, unless the cache has an intact one.

    The dataset is drawn into a temporary folder, which is then moved into place. So an interrupted
    call leaves nothing behind, and processes that draw the same dataset at the same time do not
    disturb each other.

    Args:
        config: contents of the dataset.
        cache_dir: the cache; None means $DR2NET_CACHE or ~/.cache/dr2net_d2.

    Returns:
        The COCO-format JSON and the image folder.

    Raises:
        DatasetError: the cache folder cannot be written.
    """
    folder = Path(cache_dir or cache_folder()).expanduser() / config.name
    if not _is_intact(folder, config):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making_", dir=folder.parent) as scratch:
                _write_dataset(Path(scratch) / "built", config)
                _install(Path(scratch), folder, config)
        except OSError as error:
            raise DatasetError(
                f"{folder}: cannot be written ({error}); set DR2NET_CACHE to a writable folder"
            ) from error
    return folder / "annotations.json", folder / "images"


def _check(name: str, value: Any, allowed: range | tuple[str, ...]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        word = "to" if isinstance(allowed, range) else "or"
        raise ValueError(f"{name} is {value!r}; use {allowed[0]} {word} {allowed[-1]}")


def _draw_background(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A textured canvas with clutter but no digits, ``(h, w, 3)`` uint8 in [30, 225]."""
    height, width = shape
    base = rng.uniform(85, 170) + rng.uniform(-15, 15, 3)
    texture = np.full((height, width, 3), base, dtype=np.float32)
    for cell, strength in ((96, 12), (24, 5)):
        nodes = (height // cell + 2, width // cell + 2, 3)
        grid = strength * rng.standard_normal(nodes, dtype=np.float32)
        texture += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    tone = texture.mean(axis=(0, 1))
    canvas = np.rint(np.clip(texture, 30, 225)).astype(np.uint8)
    for _ in range(rng.poisson(height * width / 256**2 * 22)):
        _draw_clutter(canvas, tone, rng)
    grain = 3 * rng.standard_normal((height, width, 1), dtype=np.float32)
    blurred = cv2.GaussianBlur(canvas, (3, 3), 0.6)
    return np.asarray(np.rint(np.clip(blurred + grain, 30, 225)), dtype=np.uint8)


def _draw_clutter(canvas: np.ndarray, tone: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a line, blob, stroke or shape that is not a digit into a uint8 canvas."""
    height, width = canvas.shape[:2]
    x, y = int(rng.integers(width)), int(rng.integers(height))
    contrast = rng.choice((-1, 1)) * rng.uniform(15, 60) + rng.uniform(-15, 15, 3)
    colour = np.clip(tone + contrast, 30, 225).tolist()
    angle, thickness, kind = rng.uniform(0, 360), int(rng.integers(1, 3)), rng.integers(4)
    if kind < 2:
        # An arc is at most half a turn, so that it does not look like a "0".
        turn, weight = (360.0, -1) if kind == 0 else (rng.uniform(50, 180), thickness + 1)
        axes = rng.integers(3, 12, 2).tolist()
        cv2.ellipse(canvas, (x, y), axes, angle, 0, turn, colour, weight, cv2.LINE_AA)
    else:
        # A line is longer than a digit, so that it does not look like a "1".
        corners = 2 if kind == 2 else int(rng.integers(3, 5))
        reach = rng.uniform(20, 60) if kind == 2 else rng.uniform(4, 12)
        turns = np.radians(angle) + 2 * np.pi * np.arange(corners) / corners
        points = (x, y) + reach * np.column_stack((np.cos(turns), np.sin(turns)))
        cv2.polylines(
            canvas, [np.rint(points).astype(np.int32)], True, colour, thickness, cv2.LINE_AA
        )


def _ink(sample: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Opacity of a digit, ``(h, w)`` float32, 0 or 0.15 to 1; cropped to the rows with ink."""
    large = cv2.resize(np.pad(sample, 2), (96, 96), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D((48, 48), rng.uniform(-12, 12), 1)
    large = np.clip(cv2.warpAffine(large, turn, (96, 96), flags=cv2.INTER_LINEAR), 0, 1)
    large = _crop(large, 0.4)
    height, width = (max(1, round(n * side / max(large.shape))) for n in large.shape)
    alpha = cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)
    # More contrast than in the 8 x 8 samples, which are too faint to read at 8 px.
    alpha = np.clip((alpha - 0.25) / 0.55, 0, 1)
    alpha[alpha < _MIN_ALPHA] = 0
    return _crop(alpha, _MIN_ALPHA)


def _crop(values: np.ndarray, threshold: float) -> np.ndarray:
    """Cut off outer rows and columns in which all values are below the threshold."""
    inside = values >= threshold
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _ink_colour(under: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that is lighter or darker than all of ``(h, w, 3)`` pixels in [30, 225]."""
    sign = rng.choice((-1, 1))
    contrast = rng.uniform(60, 140) + rng.uniform(-15, 15, 3)
    colour = np.median(under, axis=(0, 1)) + sign * contrast
    # Beyond the extremes as well, so that a stroke stays visible where it crosses clutter.
    limit = under.max(axis=(0, 1)) + 20 if sign > 0 else under.min(axis=(0, 1)) - 20
    beyond = np.maximum if sign > 0 else np.minimum
    return np.asarray(np.clip(beyond(colour, limit), 0, 255))


def _find_room(
    shape: tuple[int, int], ink: tuple[int, ...], boxes: np.ndarray, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """A box that overlaps no other by more than a tenth of the smaller; None if none is found."""
    (height, width), (h, w) = shape, ink
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for _ in range(_PLACEMENT_ROUNDS):
        corners = rng.integers((width - w + 1, height - h + 1), size=(5, 2))
        near, far = corners[:, None], corners[:, None] + (w, h)
        shared = np.minimum(boxes[:, 2:], far) - np.maximum(boxes[:, :2], near)
        overlap = shared.clip(min=0).prod(axis=2) / np.minimum(areas, h * w)
        free = np.flatnonzero((overlap <= _MAX_OVERLAP).all(axis=1))
        if free.size:
            x, y = corners[free[0]].tolist()
            return x, y, x + w, y + h
    return None


def _file_names(config: SmallDigitsConfig) -> list[str]:
    assert config.num_images is not None
    return [f"{index:06d}.png" for index in range(config.num_images)]


def _write_dataset(folder: Path, config: SmallDigitsConfig) -> None:
    canvases = (
        (name, *draw_canvas(config, index)) for index, name in enumerate(_file_names(config))
    )
    info = {"description": config.name, "version": str(_VERSION)}
    files = folder / "annotations.json", folder / "images"
    write_coco(*files, canvases, [str(digit) for digit in range(10)], info)
    (folder / "manifest.json").write_bytes(_manifest(folder, config))


def _manifest(folder: Path, config: SmallDigitsConfig) -> bytes:
    """The manifest.json that belongs to the files of a dataset in their present state."""
    names = ["annotations.json", *(f"images/{name}" for name in _file_names(config))]
    checksums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return json.dumps({"version": _VERSION, "name": config.name, "sha256": checksums}).encode()


def _is_intact(folder: Path, config: SmallDigitsConfig) -> bool:
    try:
        return (folder / "manifest.json").read_bytes() == _manifest(folder, config)
    except OSError:
        return False


def _install(scratch: Path, folder: Path, config: SmallDigitsConfig) -> None:
    """Move ``scratch/built`` into place, unless another process has done the same."""
    for attempt in range(10):
        with suppress(OSError):
            (scratch / "built").rename(folder)
        if _is_intact(folder, config):
            return
        # The folder is damaged, or another process has just moved it away.
        with suppress(FileNotFoundError):
            folder.rename(scratch / f"replaced{attempt}")
    raise OSError("still not intact after 10 tries to move it into place")
