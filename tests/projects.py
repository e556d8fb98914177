"""Scripts of projects/, which are no package."""

import importlib
import sys
from pathlib import Path

PROJECTS = Path(__file__).parents[1] / "projects"


def load(monkeypatch, project, *names):
    """Modules of a project's folder, which import each other by their file names."""
    folder = PROJECTS / project
    monkeypatch.syspath_prepend(folder)
    for file in folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    modules = [importlib.import_module(name) for name in names]
    for file in folder.glob("*.py"):
        # Set and deleted: forgotten again after the test.
        if file.stem in sys.modules:
            monkeypatch.setitem(sys.modules, file.stem, sys.modules.pop(file.stem))
    return modules
