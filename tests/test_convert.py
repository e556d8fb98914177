"""The convert command on plain ViTs: what it writes and prints serves as it stands."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dr2net_d2 import convert
from dr2net_d2.commands import load_config
from dr2net_d2.config import merge_config, vit_arguments
from dr2net_d2.config.torchvision import get_cfg
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.tv.model import build_model
from dr2net_d2.weights.checkpointer import StrictCheckpointer
from dr2net_d2.weights.files import WRITERS, read_checkpoint
from tests.tv.conftest import TINY
from tests.weights.test_formats import assert_same_features, timm_model

QUICKSTART = str(Path(__file__).parents[1] / "configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def save(model, name="in.pth"):
    torch.save({"model": model.state_dict()}, name)


def vit_of(cfg, weights):
    vit = Dr2NetViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **vit_arguments(cfg)).eval()
    StrictCheckpointer(vit).load(weights)
    return vit


def printed_config(text):
    """The config of the YAML that the command ends with."""
    keys = text[text.index("MODEL:") :]
    Path("printed.yaml").write_text(keys)
    cfg = get_cfg()
    # ViTDet-B's windows, where the weights show none, are for 12 blocks.
    merge_config(cfg, "printed.yaml", ["MODEL.VIT.WINDOW_BLOCK_INDEXES", "[]"])
    merge_config(cfg, "printed.yaml", [])
    return cfg, yaml.safe_load(keys)["MODEL"]["VIT"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_plain_vit_becomes_detectron2s(capsys, suffix):
    model = timm_model("vit_base_patch14_reg4_dinov2")
    save(model)
    assert convert.main(["in.pth", f"out{suffix}", "MODEL.VIT.NUM_HEADS", "2"]) == 0
    text = capsys.readouterr().out
    assert "left out, prefix token; ViTDet has patch tokens only (2): cls_token, reg_token" in text
    assert "folded (4): blocks.*.ls1.gamma into blocks.*.attn.proj (2x)" in text
    cfg, shown = printed_config(text)
    assert shown == {
        "PATCH_SIZE": 14, "EMBED_DIM": 32, "DEPTH": 2, "NUM_HEADS": 2, "MLP_RATIO": 4.0,
        "QKV_BIAS": True, "USE_ABS_POS": True, "USE_REL_POS": False, "PRETRAIN_IMG_SIZE": 224,
        "PRETRAIN_USE_CLS_TOKEN": False,
    }  # fmt: skip
    vit = vit_of(cfg, f"out{suffix}")
    out = read_checkpoint(f"out{suffix}")["model"]
    assert out.keys() == dict(vit.named_parameters()).keys()
    assert_same_features(vit, model, 224)


def test_windows_and_relative_positions_are_printed(capsys):
    model = timm_model("samvit_base_patch16")
    save(model)
    assert convert.main(["in.pth", "out.pth"]) == 0
    cfg, shown = printed_config(capsys.readouterr().out)
    assert (shown["IMG_SIZE"], shown["WINDOW_SIZE"]) == (256, 14)
    assert shown["WINDOW_BLOCK_INDEXES"] == [0, 1]
    assert_same_features(vit_of(cfg, "out.pth"), model, 256)


def test_a_key_of_ones_own_beside_what_the_weights_show(capsys):
    save(timm_model("vit_base_patch14_dinov2"))
    words = ["MODEL.VIT.PATCH_SIZE", "16", "MODEL.VIT.PRETRAIN_IMG_SIZE", "256"]
    assert convert.main(["in.pth", "out.pth", *words]) == 0
    text = capsys.readouterr().out
    assert "resized (1): patch_embed.proj.weight (32, 3, 14, 14) -> (32, 3, 16, 16)" in text
    assert printed_config(text)[1]["PATCH_SIZE"] == 16
    assert read_checkpoint("out.pth")["model"]["patch_embed.proj.weight"].shape[-1] == 16


def test_fitted_to_a_config(capsys):
    cfg = load_config(QUICKSTART, [], "torchvision")
    width, depth = cfg.MODEL.VIT.EMBED_DIM, cfg.MODEL.VIT.DEPTH
    save(timm_model("vit_base_patch16_224", embed_dim=width, depth=depth))
    assert (
        convert.main(
            ["--config-file", QUICKSTART, "in.pth", "out.pth", "MODEL.VIT.USE_REL_POS", "True"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "newly initialized (16): blocks.*.attn.rel_pos_h (8x), blocks.*.attn.rel_pos_w (8x)" in text
    )
    _, shown = printed_config(text)
    assert shown["PATCH_SIZE"] == cfg.MODEL.VIT.PATCH_SIZE
    out = read_checkpoint("out.pth")["model"]
    expected = dict(Dr2NetViT(**vit_arguments(cfg)).named_parameters())
    assert {k: v.shape for k, v in expected.items() if "rel_pos" not in k} == {
        key: tensor.shape for key, tensor in out.items()
    }


def test_a_detector_of_the_torchvision_engine_keeps_its_names():
    Path("tiny.yaml").write_text(TINY)
    models = [build_model(load_config("tiny.yaml", [], "torchvision")) for _ in range(2)]
    models[0].backbone.net.coefficients.set(0.5, 0.5)
    StrictCheckpointer(models[0], ".").save("model_final", iteration=7)
    assert convert.main(["model_final.pth", "out.safetensors"]) == 0
    StrictCheckpointer(models[1]).load("out.safetensors")
    assert models[1].backbone.net.coefficients.values == (0.5, 0.5)
    parameters = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)


def test_keys_are_allowed_by_pattern():
    model = timm_model("vit_base_patch16_224")
    torch.save({**model.state_dict(), "extra.a": torch.ones(1), "b.extra": torch.ones(1)}, "in.pt")
    assert convert.main(["in.pt", "out.pth", "--allow", "extra.*"]) == 2
    assert convert.main(["in.pt", "out.pth", "--allow", "extra.*", "--allow", "b.*"]) == 0
    assert "extra.a" not in read_checkpoint("out.pth")["model"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["none.pth", "out.pth"], ["none.pth", "do not exist"]),
        (["https://host/in.pth", "out.pth"], ["https://host/in.pth", "downloaded"]),
        (["in.pth", "out.bin"], ["'out.bin' must end with", ".pth, .pkl, .safetensors"]),
        (["in.pth", "none/out.pth"], ["none/out.pth", "no folder 'none'"]),
        (["in.pth", "./in.pth"], ["IN and OUT", "in.pth"]),
        (["empty.pth", "out.pth"], ["empty.pth", "empty file"]),
        (["resnet.pth", "out.pth"], ["no plain ViT", "layer1.0.conv1.weight", "ResNet"]),
        (["in.pth", "out.pth", "MODEL.VIT.DEPTH"], ["KEY VALUE pairs"]),
        (["in.pth", "out.pth", "MODEL.VIT.NONE", "1"], ["MODEL.VIT.NONE"]),
        (["in.pth", "out.pth", "MODEL.VIT.NUM_HEADS", "5"], ["embed_dim 32", "num_heads 5"]),
        (["in.pth", "out.pth", "--config-file", "none.yaml"], ["none.yaml", "does not exist"]),
        (
            ["in.pth", "out.pth", "--config-file", QUICKSTART],
            ["embed_dim is 32 in the weights, but 96 in the model", "depth is 2 in the weights"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_out_as_it_was(capsys, words, named):
    save(timm_model("vit_base_patch16_224"))
    torch.save({"layer1.0.conv1.weight": torch.ones(1)}, "resnet.pth")
    Path("empty.pth").touch()
    Path("out.pth").write_text("an older file")
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert convert.main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert line.startswith("dr2net_d2.convert: error: ")
    assert [word for word in named if word not in line] == []
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before
