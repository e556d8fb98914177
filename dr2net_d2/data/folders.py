"""Where datasets lie and where made ones are kept, by environment variables."""

import os
from pathlib import Path


def datasets_folder() -> Path:
    """$DETECTRON2_DATASETS, or datasets/ as for Detectron2 itself."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def cache_folder() -> Path:
    """$DR2NET_CACHE, or ~/.cache/dr2net_d2."""
    return Path(os.environ.get("DR2NET_CACHE") or "~/.cache/dr2net_d2").expanduser()
