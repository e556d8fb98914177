"""The site has projects/ and configs/ beside the pages of docs/, and the table of config keys."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".json", ".jsonl", ".md", ".png", ".py", ".yaml"}

sys.path.insert(0, str(ROOT))
from dr2net_d2.config.detectron2_keys import HONOURED_SECTIONS  # noqa: E402
from dr2net_d2.config.detectron2_only_keys import DETECTRON2_ONLY_SECTIONS  # noqa: E402
from dr2net_d2.config.keys import DR2NET_SECTIONS  # noqa: E402
from dr2net_d2.config.table import anything  # noqa: E402

KEY_TABLES = {
    "keys of this project": DR2NET_SECTIONS,
    "keys that torchvision honours": HONOURED_SECTIONS,
    "keys that only Detectron2 reads": DETECTRON2_ONLY_SECTIONS,
}
"""Comment in docs/keys.md -> the sections whose keys are listed in its place."""


def on_files(files, config):
    from mkdocs.structure.files import File

    for folder in ("configs", "projects"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                name = path.relative_to(ROOT).as_posix()
                files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, **_):
    for comment, sections in KEY_TABLES.items():
        markdown = markdown.replace(f"<!-- {comment} -->", list_keys(sections))
    # Links out of docs/ and into it lead in the repository where they lead on the site.
    markdown = re.sub(r"\]\(\.\./(?=(configs|projects)/)", "](", markdown)
    return markdown.replace("](../../docs/", "](../../")


def list_keys(sections):
    """A heading and a Markdown table per section."""
    parts = []
    for section in sections:
        rows = [row(name, key) for name, key in section.full_names()]
        header = (
            ["Key", "Default", "Allowed", "Meaning"] if len(rows[0]) > 2 else ["Key", "Accepted"]
        )
        lines = [header, ["---"] * len(header), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [f"### {section.name or 'Top level'}", section.meaning, table]
    return "\n\n".join(filter(None, parts))


def row(name, key):
    if not key.meaning:  # only Detectron2 reads it
        return [f"`{name}`", key.torchvision.text]
    ranges = [key.allowed.text] if key.allowed is not anything else []
    if key.torchvision is not anything:
        ranges.append(f"with torchvision {key.torchvision.text}")
    return [f"`{name}`", f"`{key.default!r}`", "; ".join(ranges), key.meaning]
