"""Skips this folder, visibly, if Detectron2 is missing; isolates tests from each other."""

import importlib.util
import logging

import pytest


class _WithoutDetectron2(pytest.Module):
    def collect(self):
        pytest.skip("Detectron2 is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if importlib.util.find_spec("detectron2") is None:
        return _WithoutDetectron2.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DR2NET_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """At these sizes more threads cost more than they gain."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_loggers(monkeypatch):
    """Undoes after each test what Detectron2's setup does to loggers."""
    for name in ("detectron2", "fvcore", "dr2net_d2"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "propagate", logger.propagate)
        monkeypatch.setattr(logger, "handlers", list(logger.handlers))
        monkeypatch.setattr(logger, "level", logger.level)


@pytest.fixture(autouse=True)
def own_catalogs(monkeypatch):
    """Removes after each test what it has registered in Detectron2."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
