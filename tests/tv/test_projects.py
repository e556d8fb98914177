"""The projects' configs with torchvision's detectors: the same datasets, tiles and protocols."""

import math

import pytest

from dr2net_d2.commands import load_config
from dr2net_d2.config import evaluation_protocol
from dr2net_d2.tv.engine import run
from tests.small_projects import CONFIGS, arguments, small_config, write_datasets


@pytest.mark.parametrize("path", CONFIGS[::2], ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_project_trains_and_is_evaluated(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path / "cache"))
    write_datasets(path.parts[-3], tmp_path)
    config = small_config(path, tmp_path)
    results = run(arguments(config, tmp_path / "output"))
    protocol = evaluation_protocol(load_config(str(config), [], "torchvision"))
    assert {metric.name for metric in protocol.metrics} <= results["bbox"].keys()
    assert any(math.isfinite(value) for value in results["bbox"].values())
