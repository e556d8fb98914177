"""``demo.py``: which files it reads and writes, videos, cameras, windows, what it refuses.

The detector here finds white squares; those of the engines are in tests/tv and tests/d2.
"""

import logging
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest

from dr2net_d2.errors import ConfigError, DatasetError
from dr2net_d2.inference import Detections
from dr2net_d2.inference.demo import choose_outputs, draw_all, find_inputs
from dr2net_d2.inference.video import Window


class FindsWhite:
    class_names = ("white",)

    def detect(self, image):
        rows, columns = (image.min(axis=2) > 200).nonzero()
        boxes = np.array([(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)])
        return Detections(boxes.astype(np.float32), np.ones(1, dtype=np.float32), np.zeros(1, int))


def frame(left, side=64):
    image = np.full((side, side, 3), 60, dtype=np.uint8)
    image[20:30, left : left + 10] = 255
    return image


def white(picture):
    """(x0, x1) of the white square in a picture, in px of the frame that it was drawn into."""
    columns = (picture.min(axis=2) > 200).sum(axis=0)
    found = (columns > 5 * len(picture) // 64).nonzero()[0]
    return [round(edge * 64 / len(picture)) for edge in (found.min(), found.max() + 1)]


def outlined(picture):
    """Whether a box has been drawn: colours, where the frames have greys alone."""
    return (picture.max(axis=2).astype(int) - picture.min(axis=2) > 100).sum() > 200


def write_video(path, codec, lefts, rate=12.0):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (64, 64))
    for left in lefts:
        writer.write(frame(left))
    writer.release()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.fixture
def folder(tmp_path):
    """Two images, one that is none, a video, and a text."""
    images = tmp_path / "in"
    images.mkdir()
    for name, left in (("a.png", 5), ("b.jpg", 40)):
        cv2.imwrite(str(images / name), frame(left))
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:60])
    write_video(images / "v.avi", "MJPG", [0, 10, 20])
    (images / "notes.txt").write_text("no image")
    return images


def test_folders_files_and_patterns(folder):
    def names(*words):
        return [path.name for path in find_inputs(words)]

    assert names(str(folder)) == ["a.png", "b.jpg", "cut.png", "v.avi"]
    assert names(str(folder / "*.png"), str(folder / "a.png")) == ["a.png", "cut.png"]
    assert names(str(folder.parent / "**/*.jpg")) == ["b.jpg"]
    (folder / "x[1].png").write_bytes((folder / "a.png").read_bytes())
    assert names(str(folder / "x[1].png")) == ["x[1].png"]
    (folder.parent / "empty").mkdir()
    for word in ("absent.png", str(folder / "*.bmp"), str(folder.parent / "empty")):
        with pytest.raises(ConfigError, match=r"--input: .* is no file, no folder"):
            find_inputs([word])


def test_outputs_are_named_after_the_inputs(folder, tmp_path):
    inputs = [*find_inputs([str(folder)]), folder / "photo.JPG", folder / "photo.dat", 0]
    drawn = choose_outputs(inputs, str(tmp_path / "out"))
    assert [path.name for path in drawn] == [
        *("a.png", "b.jpg", "cut.png", "v.mp4", "photo.JPG", "photo.dat.png", "webcam0.mp4")
    ]
    assert choose_outputs([folder / "a.png"], "x/y.jpg") == [Path("x/y.jpg")]
    assert choose_outputs([folder / "v.avi"], "x/y.avi") == [Path("x/y.avi")]


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["a.png", "b.jpg"], "one.png", "is one file and no folder; it needs a single input"),
        (["a.png"], "one.mp4", "'one.mp4' .* for 'a.png'"),
        (["v.avi"], "one.webm", ".avi, .mkv, .mov, .mp4 for 'v.avi'"),
        (["v.avi"], "one.png", ".avi, .mkv, .mov, .mp4 for 'v.avi'"),
        (["a/v.avi", "b/v.mov"], "out", r"'a/v.avi' and 'b/v.mov' would both .*out/v.mp4"),
        (["in/a.png"], "in", "would replace the input"),
        (["in/a.png"], "other/../in/a.png", "would replace the input"),
    ],
)
def test_outputs_that_would_be_lost_or_lose_others_are_refused(inputs, output, message):
    with pytest.raises(ConfigError, match=f"--output.*{message}"):
        choose_outputs(list(map(Path, inputs)), output)


def test_a_folder_is_drawn_but_for_what_is_unreadable(folder, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    inputs = find_inputs([str(folder)])
    with caplog.at_level(logging.INFO):
        draw_all(FindsWhite(), inputs, choose_outputs(inputs, str(tmp_path / "out")))
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.png", "b.jpg", "v.mp4"]
    for name, left in (("a.png", 5), ("b.jpg", 40)):
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert white(picture) == [left, left + 10]
        assert outlined(picture)
    text = caplog.text
    assert "a.png: 1 objects" in text and "v.avi: frame 3 of 3, 1 objects" in text
    assert "left out: " in text and "cut.png: 60 bytes that are not a readable image" in text
    assert "1 of 4 inputs could not be read" in text


def test_inputs_none_of_which_can_be_read_are_an_error(folder, tmp_path):
    (folder / "also.mp4").write_bytes(b"no video")
    inputs = [folder / "cut.png", folder / "also.mp4"]
    with pytest.raises(DatasetError, match=r"also.mp4: not a readable video"):
        draw_all(FindsWhite(), inputs, choose_outputs(inputs, str(tmp_path)))
    assert not list(tmp_path.glob("*.*"))


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "MJPG"), (".mp4", "mp4v")])
def test_a_video_keeps_its_frames_and_its_rate(tmp_path, suffix, codec):
    source, drawn = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write_video(source, codec, range(0, 50, 10))
    draw_all(FindsWhite(), [source], [drawn])
    frames, rate = read_video(drawn)
    assert rate == 12
    for left, picture in zip(range(0, 50, 10), frames, strict=True):
        assert np.abs(np.array(white(picture)) - (left, left + 10)).max() <= 1
        assert outlined(picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, drawn.name]


def test_a_video_whose_detection_fails_leaves_no_file(tmp_path):
    write_video(tmp_path / "in.avi", "MJPG", [0, 10])
    detector = FindsWhite()
    detector.detect = mock.Mock(side_effect=[detector.detect(frame(0)), MemoryError])
    with pytest.raises(MemoryError):
        draw_all(detector, [tmp_path / "in.avi"], [tmp_path / "out.avi"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.avi"]


class Camera:
    """Gives frames until Ctrl-C; what ``cv2.VideoCapture`` has is asked for here alone."""

    def __init__(self, number):
        assert number == 1
        self.left = 0

    def get(self, _):
        return 0.0

    def read(self):
        if self.left == 40:
            raise KeyboardInterrupt
        self.left += 10
        return True, frame(self.left)

    def release(self):
        self.left = None


def test_what_a_camera_saw_until_ctrl_c_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    draw_all(FindsWhite(), [1], [tmp_path / "seen.avi"])
    monkeypatch.undo()
    frames, _ = read_video(tmp_path / "seen.avi")
    assert [white(picture)[0] // 10 for picture in frames] == [1, 2, 3, 4]


def test_a_camera_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"camera 99 gives no frame"):
        draw_all(FindsWhite(), [99], [tmp_path / "seen.avi"])


@pytest.mark.parametrize(("keys", "shown"), [([-1, -1, 32, 32], 2), ([113], 1), ([27], 1)])
def test_a_window_waits_for_a_key_and_ends_at_q_or_escape(folder, monkeypatch, keys, shown):
    pictures = []
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: mock.Mock(returncode=0))
    for name, effect in (
        ("namedWindow", lambda *_: None),
        ("imshow", lambda _, picture: pictures.append(picture)),
        ("waitKey", lambda _: keys.pop(0)),
        ("getWindowProperty", lambda *_: 1.0),
    ):
        monkeypatch.setattr(cv2, name, effect)
    window = Window()
    draw_all(FindsWhite(), [folder / "a.png", folder / "b.jpg"], [window, window])
    assert [outlined(picture) for picture in pictures] == [True] * shown
    assert keys == []


def test_a_window_that_was_closed_ends_a_video(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: mock.Mock(returncode=0))
    for name, value in (("namedWindow", 0), ("imshow", 0), ("waitKey", -1)):
        monkeypatch.setattr(cv2, name, lambda *_, value=value: value)
    visible = [1.0, 0.0]
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: visible.pop(0))
    window = Window()
    draw_all(FindsWhite(), [folder / "v.avi", folder / "a.png"], [window, window])
    assert visible == []


@pytest.mark.skipif(sys.platform != "linux", reason="a screen cannot be taken away elsewhere")
def test_without_a_screen_a_window_is_an_error_and_no_crash(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"no window can be opened here .*--output"):
        Window()
