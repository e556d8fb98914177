"""Read frames and write or show pictures with OpenCV: video files, cameras, a window."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from dr2net_d2.errors import ConfigError, DatasetError

CODECS = {".avi": "MJPG", ".mkv": "MJPG", ".mov": "mp4v", ".mp4": "mp4v"}
"""Suffix -> codec, of the videos that every build of OpenCV can write."""

_WINDOW = "detections"


class Frames:
    """The frames of a video file or a camera, (H, W, 3) uint8, BGR; a context that closes it.

    Args:
        source: a path, or the number of a camera.

    Attributes:
        count: number of frames according to the file, None if unknown.
        rate: frames per second.

    Raises:
        DatasetError: on entering, if there is no first frame.
    """

    def __init__(self, source: Path | int) -> None:
        self._source = source
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0

    def __enter__(self) -> Frames:
        succeeded, self._first = self._capture.read()
        if not succeeded:
            self._capture.release()
            raise DatasetError(
                f"camera {self._source} gives no frame; connect it, or choose another number"
                if isinstance(self._source, int)
                else f"{self._source}: not a readable video; restore the file"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        succeeded, frame = True, self._first
        while succeeded:
            yield frame
            succeeded, frame = self._capture.read()


class VideoFile:
    """A video file to write; a context, on whose exit the complete file appears under its name.

    Args:
        path: the file, with a suffix of ``CODECS``.
        rate: frames per second.

    Raises:
        ConfigError: on the first ``write``, if the file cannot be written.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self._rate = rate
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoFile:
        return self

    def write(self, picture: np.ndarray) -> None:
        """Append a picture, (H, W, 3) uint8, BGR; all must have the same size."""
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*CODECS[self._path.suffix.lower()])
            size = (picture.shape[1], picture.shape[0])
            self._writer = cv2.VideoWriter(str(self._partial), codec, self._rate, size)
            if not self._writer.isOpened():
                raise ConfigError(f"--output {str(self._path)!r} cannot be written; choose another")
        self._writer.write(picture)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


class Window:
    """A window on the screen.

    Raises:
        ConfigError: there is no display, or OpenCV was built without windows.
    """

    def __init__(self) -> None:
        # In another process, because Qt aborts the process if it cannot open a window.
        probe = "import cv2; cv2.namedWindow('probe'); cv2.destroyAllWindows()"
        if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
            raise ConfigError(
                "no window can be opened here (no display, or an OpenCV without windows); write "
                "files with --output"
            )

    def show(self, picture: np.ndarray, wait: bool) -> bool:
        """Show a picture; with ``wait``, until a key is pressed.

        Returns:
            False if the user pressed Esc or q, or closed the window; else True.
        """
        cv2.namedWindow(_WINDOW, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        cv2.imshow(_WINDOW, picture)
        while True:
            key = cv2.waitKey(50 if wait else 1)
            if key in (27, ord("q")) or cv2.getWindowProperty(_WINDOW, cv2.WND_PROP_VISIBLE) < 1:
                return False
            if key != -1 or not wait:
                return True


def write_image(path: Path, picture: np.ndarray) -> None:
    """Write a picture, (H, W, 3) uint8, BGR, in the format of the suffix."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(cv2.imencode(path.suffix, picture)[1].tobytes())
    partial.replace(path)
