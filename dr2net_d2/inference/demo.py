"""The command ``demo.py``: draw the detections in images, videos or a webcam's frames."""

from __future__ import annotations

import argparse
import glob
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dr2net_d2.commands import make_parser, writable_folder
from dr2net_d2.data import read_pixels
from dr2net_d2.errors import ConfigError, DatasetError
from dr2net_d2.inference.detections import Predictor
from dr2net_d2.inference.drawing import draw_detections
from dr2net_d2.inference.loading import load_predictor, open_config
from dr2net_d2.inference.video import CODECS, Frames, VideoFile, Window, write_image

logger = logging.getLogger(__name__)

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (*CODECS, ".m4v", ".mpeg", ".mpg", ".webm", ".wmv")

LOG_PERIOD = 50
"""Number of frames between two log lines."""


def parse_arguments(
    description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    parser = make_parser("demo.py", description)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        "--video-input",
        nargs="+",
        metavar="PATH",
        help="images, videos, folders of them, patterns such as 'photos/*.jpg'",
    )
    source.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="INDEX", help="a camera, default: 0"
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a folder, or a file for a single input; a window opens if there is none",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="objects with lower scores are not drawn, default: 0.5",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Detect and draw as the arguments say; unreadable inputs among several are left out.

    Raises:
        UserError: an option, the config or the weights cannot be used, or no input can be read.
    """
    if not 0 <= args.confidence_threshold <= 1:
        raise ConfigError(
            f"--confidence-threshold is {args.confidence_threshold:g}; it must be from 0 to 1"
        )
    inputs: Sequence[Path | int] = find_inputs(args.input) if args.input else [args.webcam]
    outputs = choose_outputs(inputs, args.output) if args.output else [Window()] * len(inputs)
    cfg, engine = open_config(args)
    for section in cfg.MODEL.values():
        if isinstance(section, CfgNode) and "SCORE_THRESH_TEST" in section:
            section.SCORE_THRESH_TEST = args.confidence_threshold
    predictor = load_predictor(cfg, engine)
    if isinstance(outputs[0], Path):
        writable_folder(str(outputs[0].parent), "demo")
    with logging_redirect_tqdm():
        draw_all(predictor, inputs, outputs)


def find_inputs(words: Sequence[str]) -> list[Path]:
    """The files that the words of --input name; in a folder, its images and videos.

    Raises:
        ConfigError: a word names no file.
    """
    inputs: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            known = (*IMAGES, *VIDEOS)
            files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in known]
        elif path.exists():
            files = [path]
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))
            files = sorted(file for file in matches if file.is_file())
        if not files:
            raise ConfigError(
                f"--input: {word!r} is no file, no folder with images or videos, and no pattern "
                "that matches a file (config overrides come last, after another option)"
            )
        inputs += files
    return list(dict.fromkeys(inputs))


def choose_outputs(inputs: Sequence[Path | int], output: str) -> list[Path]:
    """The file that each input is drawn to: one of its name in a folder, or the named file.

    Args:
        inputs: files, or the number of a camera.
        output: a folder, or a file with the suffix of an image or a video.

    Raises:
        ConfigError: the named file is not for a single input of its kind, two inputs would be drawn
            to the same file, or a file would replace an input.
    """
    path = Path(output).expanduser()
    if path.is_dir() or path.suffix.lower() not in (*IMAGES, *VIDEOS):
        outputs = [path / _output_name(source) for source in inputs]
    else:
        allowed = CODECS if _is_video(inputs[0]) else IMAGES
        if len(inputs) > 1 or path.suffix.lower() not in allowed:
            raise ConfigError(
                f"--output {output!r} is one file and no folder; it needs a single input, and "
                f"{', '.join(allowed)} for {str(inputs[0])!r}"
            )
        outputs = [path]
    first: dict[Path, Path | int] = {}
    files = {source.resolve() for source in inputs if isinstance(source, Path)}
    for source, drawn in zip(inputs, outputs, strict=True):
        if first.setdefault(drawn, source) != source:
            raise ConfigError(
                f"--output: {str(first[drawn])!r} and {str(source)!r} would both be drawn to "
                f"{str(drawn)!r}; draw them one by one, into two folders"
            )
        if drawn.resolve() in files:
            raise ConfigError(
                f"--output {output!r} would replace the input {str(drawn)!r}; name another folder"
            )
    return outputs


def draw_all(
    predictor: Predictor, inputs: Sequence[Path | int], outputs: Sequence[Path | Window]
) -> None:
    """Draw the detections in each input, until the user closes the window or interrupts a video.

    Raises:
        DatasetError: no input can be read.
    """
    unreadable = 0
    pairs = zip(inputs, outputs, strict=True)
    for source, output in tqdm(pairs, total=len(inputs), unit="input", disable=None):
        draw = _draw_video if _is_video(source) else _draw_image
        try:
            if not draw(predictor, source, output):
                return
        except DatasetError as error:
            unreadable += 1
            if unreadable == len(inputs):
                raise
            logger.warning("left out: %s", error)
    if unreadable:
        logger.warning("%d of %d inputs could not be read", unreadable, len(inputs))


def _draw_image(predictor: Predictor, path: Any, output: Path | Window) -> bool:
    """Draw an image; returns whether to go on with the next input."""
    image = read_pixels(path)
    start = time.perf_counter()
    detections = predictor.detect(image)
    picture = draw_detections(image, detections, predictor.class_names)
    seconds = time.perf_counter() - start
    logger.info("%s: %d objects, %.2f s", path, len(detections.boxes), seconds)
    if isinstance(output, Window):
        return output.show(picture, wait=True)
    write_image(output, picture)
    return True


def _draw_video(predictor: Predictor, source: Path | int, output: Path | Window) -> bool:
    """Draw a video; returns whether to go on. After an interrupt, what has been drawn is kept."""
    with ExitStack() as stack:
        frames = stack.enter_context(Frames(source))
        progress = tqdm(frames, str(source), frames.count, unit="frame", disable=None)
        if isinstance(output, Path):
            file = stack.enter_context(VideoFile(output, frames.rate))
        try:
            for number, frame in enumerate(progress, 1):
                detections = predictor.detect(frame)
                picture = draw_detections(frame, detections, predictor.class_names)
                if number % LOG_PERIOD == 1 or number == frames.count:
                    of = f" of {frames.count}" if frames.count else ""
                    count = len(detections.boxes)
                    logger.info("%s: frame %d%s, %d objects", source, number, of, count)
                if isinstance(output, Path):
                    file.write(picture)
                elif not output.show(picture, wait=False):
                    return False
        except KeyboardInterrupt:
            return False
    return True


def _is_video(source: Path | int) -> bool:
    return isinstance(source, int) or source.suffix.lower() in VIDEOS


def _output_name(source: Path | int) -> str:
    if isinstance(source, int):
        return f"webcam{source}.mp4"
    if _is_video(source):
        return f"{source.stem}.mp4"
    return source.name if source.suffix.lower() in IMAGES else f"{source.name}.png"
