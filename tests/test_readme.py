"""README against the repository: its links, its code, its YAML, its commands."""

import re
from pathlib import Path

import pytest
import yaml

from dr2net_d2.config import merge_config
from dr2net_d2.config.torchvision import get_cfg
from dr2net_d2.core import reversible_stacks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OWN_NETWORK = (ROOT / "docs/own_network.md").read_text()
"""The page for users without Detectron2: its code runs here, too."""


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "page", ["README.md", *ROOT.glob("projects/*/README.md"), *ROOT.glob("docs/**/*.md")], ids=str
)
def test_links_lead_somewhere(page):
    page = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        assert target.startswith("http") or (page.parent / path).exists(), target
        if heading and not target.startswith("http"):
            text = (page.parent / path).read_text().lower()
            assert f"# {heading.replace('-', ' ')}\n" in text, target


@pytest.mark.parametrize("code", blocks("python") + blocks("python", OWN_NETWORK))
def test_python_blocks_run(code):
    scope = {}
    if "dr2net_d2.d2" in code:
        pytest.importorskip("detectron2")
        from dr2net_d2.d2.zoo import zoo_config

        scope["model"] = zoo_config("common/models/mask_rcnn_vitdet.py").model
    exec(code, scope)
    if "features" in scope:
        assert scope["features"].shape == (1, 192, 16, 16)
    if "network" in scope:
        assert len(reversible_stacks(scope["network"])) == 4
    if "schedule" in scope:  # it has moved the coefficients
        assert scope["stacks"][0].coefficients.values == (0.5, 0.5)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_configs(text, tmp_path):
    (tmp_path / "readme.yaml").write_text(text)
    cfg = get_cfg()
    merge_config(cfg, str(tmp_path / "readme.yaml"), [])
    assert yaml.safe_load(text)["MODEL"]["BACKBONE"]["NAME"] == cfg.MODEL.BACKBONE.NAME


def test_files_that_it_names_exist():
    for name in re.findall(r"`((?:tests|configs|dr2net_d2|projects)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
