"""The folders of original and of generated datasets, which environment variables can change."""

import os
from pathlib import Path


def datasets_folder() -> Path:
    """$DETECTRON2_DATASETS; by default datasets/, as in Detectron2."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def cache_folder() -> Path:
    """$DR2NET_CACHE; by default ~/.cache/dr2net_d2."""
    return Path(os.environ.get("DR2NET_CACHE") or "~/.cache/dr2net_d2").expanduser()
