"""README against the repository: its links, its code, its YAML, its commands."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from dr2net_d2.config import merge_config
from dr2net_d2.config.torchvision import get_cfg
from dr2net_d2.core import Dr2NetViT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, monkeypatch, tmp_path):
    scope = {"max_iter": 3, "images": torch.zeros(1, 3, 64, 64)}
    scope |= {"labels": torch.zeros(1, dtype=torch.long), "criterion": F.cross_entropy}
    if "dr2net_d2.d2" in code:
        pytest.importorskip("detectron2")
        from dr2net_d2.d2.zoo import zoo_config

        scope["model"] = zoo_config("common/models/mask_rcnn_vitdet.py").model
    monkeypatch.chdir(tmp_path)
    Path("my_vitdet.yaml").write_text(blocks("yaml")[0])
    # A ViT-B at 1024 px is more than a test needs: the same call, a smaller network.
    small = {"img_size": 64, "embed_dim": 32, "depth": 12, "num_heads": 2, "pretrain_img_size": 64}
    original = Dr2NetViT.__init__
    monkeypatch.setattr(
        Dr2NetViT, "__init__", lambda self, **given: original(self, **{**given, **small})
    )
    exec(code, scope)
    if "features" in scope:
        assert scope["features"].shape == (1, 32, 4, 4)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_configs(text, tmp_path):
    (tmp_path / "readme.yaml").write_text(text)
    cfg = get_cfg()
    merge_config(cfg, str(tmp_path / "readme.yaml"), [])
    assert yaml.safe_load(text)["MODEL"]["BACKBONE"]["NAME"] == cfg.MODEL.BACKBONE.NAME


def test_files_that_it_names_exist():
    for name in re.findall(r"`((?:tests|configs|dr2net_d2|projects)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
