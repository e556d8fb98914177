"""The site has projects/ and configs/ beside the pages of docs/, so that links to them work."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SUFFIXES = {".json", ".jsonl", ".md", ".png", ".py", ".yaml"}


def on_files(files, config):
    for folder in ("configs", "projects"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                name = path.relative_to(ROOT).as_posix()
                files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, **_):
    """Links out of docs/ and into it lead in the repository where they lead on the site."""
    markdown = re.sub(r"\]\(\.\./(?=(configs|projects)/)", "](", markdown)
    return markdown.replace("](../../docs/", "](../../")
