"""Files that a running training writes: log.txt, metrics.json and TensorBoard events."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dr2net_d2.training import read_metrics

_LOGGERS = ("dr2net_d2", "fvcore")


class RunLog:
    """A context that holds log lines back until ``open`` names the folder for log.txt.

    So a run that is refused leaves no file, and the log of one that starts has its first lines.
    """

    def __init__(self) -> None:
        self._memory = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> RunLog:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).addHandler(self._memory)
        return self

    def open(self, output_dir: Path) -> None:
        self._file = logging.FileHandler(output_dir / "log.txt")
        self._file.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s: %(message)s"))
        self._memory.setTarget(self._file)
        self._memory.flush()
        self._memory.capacity = 1  # written line by line from now on

    def __exit__(self, *_: object) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._memory)
        self._memory.close()
        if self._file is not None:
            self._file.close()


class MetricWriter:
    """Writes scalars to TensorBoard, and to metrics.json as one JSON object per line.

    Args:
        output_dir: an existing folder.
        start: first iteration of this run; later lines of an interrupted run are removed.
    """

    def __init__(self, output_dir: Path, start: int) -> None:
        path = output_dir / "metrics.json"
        rows = read_metrics(path) if start and path.is_file() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["iteration"] < start]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(output_dir), purge_step=start)

    def write(self, iteration: int, scalars: Mapping[str, float], **notes: str) -> None:
        """Write the scalars of an iteration; only metrics.json gets the ``notes`` about them."""
        self._file.write(json.dumps({"iteration": iteration, **notes, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._file.close()
        self._events.close()
