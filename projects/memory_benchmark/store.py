"""The measurements' file: what was measured, by which arm, and where an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dr2net_d2.errors import ConfigError

ARMS = {
    "stock": "stock",
    "stock-checkpoint": "stock + checkpoint",
    "our-attention-checkpoint": "our attention + checkpoint",
    "frozen": "frozen backbone",
    "dr2net-float": "dr2net float",
    "dr2net-exact": "dr2net exact",
}
"""Name on the command line and in the file -> name in tables and pictures."""

LEAN_ARMS: dict[str, tuple[str, ...]] = {
    "dr2net-stock-heads": (),
    "dr2net-lean-pyramid": ("pyramid",),
    "dr2net-lean-rpn": ("rpn",),
    "dr2net-lean-roi": ("roi",),
    "dr2net-exact": ("pyramid", "rpn", "roi"),
}
"""Of dr2net exact -> MODEL.DR2NET.LEAN, to see what each part saves and costs."""

DEPTHS = {"ti": 12, "s": 12, "b": 12, "l": 24, "h": 32}
"""Model -> its own number of blocks."""

SCOPES = ("detector", "vit")
PRECISIONS = ("fp32", "bf16")
MEASURED, OUT_OF_MEMORY, FAILED = "measured", "out of memory", "failed"


class Work(NamedTuple):
    """One configuration, which all arms are measured at.

    ``size`` is the side of the square images in px; ``depth`` None is the model's own.
    """

    scope: str
    model: str
    depth: int | None
    size: int
    batch: int
    precision: str
    objects: int
    seed: int

    def __str__(self) -> str:
        depth = f", {self.depth} blocks" if self.depth else ""
        part = "Mask R-CNN" if self.scope == "detector" else "ViT alone"
        return (
            f"ViT-{self.model.capitalize()}{depth}, {part}, {self.size} px, {self.precision}, "
            f"batch {self.batch}"
        )


class Results:
    """Rows in a JSON file, one per configuration and arm; written anew after every measurement.

    Args:
        path: of the file; it need not exist.
        setting: hardware, versions, threads; those of the file must agree, or its times could not
            be compared. None reads only.

    Raises:
        ConfigError: the file is not readable, or from another setting.
    """

    def __init__(self, path: Path, setting: dict[str, Any] | None = None) -> None:
        self.path = path
        content: dict[str, Any] = {"setting": setting, "rows": []}
        if path.is_file():
            try:
                content = json.loads(path.read_text())
                content["setting"], content["rows"]
            except (ValueError, LookupError, TypeError) as error:
                raise ConfigError(
                    f"{path} is not a file of measurements ({error!r}); choose another --output"
                ) from error
        if setting is not None and content["setting"] != setting:
            differing = sorted(
                f"{key} {content['setting'].get(key)!r}, now {value!r}"
                for key, value in setting.items()
                if content["setting"].get(key) != value
            )
            raise ConfigError(
                f"{path} was measured with {'; '.join(differing)}; choose another --output, or "
                "measure as then"
            )
        self.setting: dict[str, Any] = content["setting"]
        self.rows: list[dict[str, Any]] = content["rows"]

    def find(self, work: Work, arm: str) -> dict[str, Any] | None:
        wanted = {**work._asdict(), "arm": arm}
        return next((row for row in self.rows if row.items() >= wanted.items()), None)

    def put(self, work: Work, arm: str, **values: Any) -> dict[str, Any]:
        """Add to the row of an arm, which is made if need be, and write the file."""
        row = self.find(work, arm)
        if row is None:
            row = {**work._asdict(), "arm": arm}
            self.rows.append(row)
        row.update(values)
        if row["status"] == MEASURED:
            row.pop("message", None)
        self.save()
        return row

    def save(self) -> None:
        lines = ",\n    ".join(json.dumps(row, allow_nan=False) for row in self.rows)
        setting = json.dumps(self.setting, indent=2).replace("\n", "\n  ")
        partial_file = self.path.with_name(f"{self.path.name}.partial")
        partial_file.write_text(f'{{\n  "setting": {setting},\n  "rows": [\n    {lines}\n  ]\n}}\n')
        partial_file.replace(self.path)

    def works(self) -> Iterator[Work]:
        """The distinct configurations, in the order of the file."""
        yield from dict.fromkeys(Work(*(row[name] for name in Work._fields)) for row in self.rows)


def turns(row: dict[str, Any]) -> int:
    """How often a row's step was timed."""
    return len(row.get("backward_seconds", ()))


def step_seconds(row: dict[str, Any]) -> list[float]:
    """Forward and backward together, a value per turn."""
    return [
        forward + backward
        for forward, backward in zip(row["forward_seconds"], row["backward_seconds"], strict=True)
    ]
