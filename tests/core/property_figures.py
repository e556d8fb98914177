"""What the property suite has seen: printed below pytest's summary, and written as JSON."""

import json
import os
import platform
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import settings


class Figures:
    """Counts the examples that have passed; every figure's worst value, with its example."""

    def __init__(self):
        self.started = time.perf_counter()
        self.examples = set()
        self.worst = {}
        self.ratios = {}
        self.counts = Counter()

    def note(self, example, **values):
        self.counts.update([example.dtype, f"coefficients {example.schedule}", *values])
        self.ratios.setdefault(example.dtype, []).append(values["error_ratio"])
        for name, value in values.items():
            if name not in self.worst or value > self.worst[name][0]:
                self.worst[name] = (value, example)

    def quantiles(self):
        """Of the error ratio on one draw, by dtype."""
        return {
            dtype: {level: _quantile(ratios, level) for level in (0.5, 0.9, 0.99, 1.0)}
            for dtype, ratios in sorted(self.ratios.items())
        }

    def lines(self):
        yield f"{len(self.examples)} random stacks; the worst of each figure:"
        for name, (value, example) in self.worst.items():
            count = f" (of {self.counts[name]})"
            rest = " ... (DR2NET_PROPERTIES=FILE writes all of it)"
            where = textwrap.shorten(str(example), 400, placeholder=rest)
            yield f"{name} {value:.3g}{count} at {where}" if value else f"{name} 0{count}"
        for dtype, levels in self.quantiles().items():
            values = ", ".join(f"{level:.0%} {value:.2f}" for level, value in levels.items())
            yield f"quantiles of error_ratio, {dtype}: {values}"

    def write(self, path):
        content = {
            "examples": len(self.examples),
            "counts": dict(sorted(self.counts.items())),
            "worst": {
                name: {"value": value, "example": asdict(example)}
                for name, (value, example) in self.worst.items()
            },
            "error_ratio_quantiles": self.quantiles(),
            "hypothesis_profile": settings.get_current_profile_name(),
            "seconds": round(time.perf_counter() - self.started),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": _processor(),
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


FIGURES = Figures()


def report(terminal):
    """Called at the end of a pytest session; silent when the suite has not run."""
    if not FIGURES.worst:
        return
    terminal.section("properties of exact arithmetic")
    for line in FIGURES.lines():
        terminal.write_line(line)
    if path := os.environ.get("DR2NET_PROPERTIES"):
        FIGURES.write(path)


def _quantile(values, level):
    return sorted(values)[min(int(level * len(values)), len(values) - 1)]


def _processor():
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.is_file() else []
    return next((n.split(":")[1].strip() for n in names if "model name" in n), platform.processor())
