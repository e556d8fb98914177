"""What a training leaves in OUTPUT_DIR while it runs: log.txt, metrics.json, TensorBoard events."""

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
    """A context that keeps this package's log lines until ``open`` says where log.txt goes.

    So a run that is refused leaves no file, and one that starts has its first lines on record.
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
        self._memory.capacity = 1  # line by line from here on

    def __exit__(self, *_: object) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._memory)
        self._memory.close()
        if self._file is not None:
            self._file.close()


class MetricWriter:
    """Scalars to metrics.json, a JSON object a line as Detectron2 has it, and to TensorBoard.

    Args:
        output_dir: an existing folder.
        start: the first iteration to come; lines from there on, of a run that was cut off, go.
    """

    def __init__(self, output_dir: Path, start: int) -> None:
        path = output_dir / "metrics.json"
        rows = read_metrics(path) if start and path.is_file() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["iteration"] < start]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(output_dir), purge_step=start)

    def write(self, iteration: int, scalars: Mapping[str, float], **notes: str) -> None:
        """A line of both; the notes, which say what the scalars are, stand in metrics.json only."""
        self._file.write(json.dumps({"iteration": iteration, **notes, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._file.close()
        self._events.close()
