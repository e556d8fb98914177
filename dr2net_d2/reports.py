"""Writing what was found: a JSON file and a picture of it, both or neither; tables into a page."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dr2net_d2.errors import ConfigError

logger = logging.getLogger(__name__)


def writable_folder(folder: str, name: str) -> Path:
    """The folder, made if need be, after a look whether <name>.json could be written to it.

    Raises:
        ConfigError: it could not.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{name}.json.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output folder {folder!r} cannot be written ({error.strerror}); choose another by "
            "--output"
        ) from error
    return path


def write_report(
    folder: Path, name: str, results: dict[str, Any], draw: Callable[[Path], object]
) -> None:
    """Write <name>.json, and <name>.png by ``draw``, which gets the path to draw to."""
    data, picture = folder / f"{name}.json.partial", folder / f"{name}.png.partial"
    data.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    draw(picture)
    for partial_file in (data, picture):
        partial_file.replace(partial_file.with_suffix(""))
    logger.info("wrote %s", folder / f"{name}.{{json,png}}")


def fill_page(page: Path, tables: dict[str, str]) -> None:
    """Replace what stands between <!-- name --> and <!-- /name --> in a page.

    Raises:
        ConfigError: no such page, or it has no such pair.
    """
    if not page.is_file():
        raise ConfigError(f"{page} does not exist; give a page with markers")
    text = page.read_text()
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ConfigError(f"{page} lacks {start} or {end}; put both where the table is to be")
        text = f"{before}{start}\n{table}\n{end}{after}"
    page.write_text(text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
