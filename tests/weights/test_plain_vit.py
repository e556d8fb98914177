"""What becomes of every key: the report, partial loads, position tables of other sizes."""

import pytest
import timm
import torch

from dr2net_d2.core import Dr2NetViT
from dr2net_d2.weights.detectors import convert_detector_checkpoint
from dr2net_d2.weights.formats import describe_vit, find_plain_vit
from dr2net_d2.weights.matching import redundant_scalars
from dr2net_d2.weights.plain_vit import convert_vit_checkpoint, plain_vit_state_dict


def timm_vit(**options):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=4, **options
    )


def our_vit(**options):
    arguments = {
        "img_size": 128, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "pretrain_img_size": 64, "use_rel_pos": True,
    }  # fmt: skip
    return Dr2NetViT(**{**arguments, **options})


def test_the_report_names_every_key_and_condenses_blocks():
    checkpoint = timm_vit(num_classes=10, init_values=0.5).state_dict()
    vit = our_vit(pretrain_img_size=96)
    converted, report = convert_vit_checkpoint(checkpoint, vit)
    assert report.problems() == []
    fates = [*report.loaded, *report.resized, *report.folded, *report.dropped]
    assert sorted(fates) == sorted(checkpoint)
    assert {*converted, *report.initialized} == dict(vit.named_parameters()).keys()
    text = "\n".join(report.lines())
    assert "resized (1): pos_embed (1, 65, 32) -> (1, 145, 32)" in text
    assert "folded (4): blocks.*.ls1.gamma into blocks.*.attn.proj (2x)" in text
    assert (
        "newly initialized (4): blocks.*.attn.rel_pos_h (2x), blocks.*.attn.rel_pos_w (2x)" in text
    )
    assert "left out, prefix token; ViTDet has patch tokens only (1): cls_token" in text
    brief = report.lines(brief=True)
    assert brief[:3] == [
        "source: timm", "loaded (26)", "left out, prefix token; ViTDet has patch tokens only (1)",
    ]  # fmt: skip
    assert set(report.lines()[-3:]) <= set(brief)
    weight = checkpoint["blocks.1.mlp.fc2.weight"] * checkpoint["blocks.1.ls2.gamma"][:, None]
    assert torch.equal(converted["blocks.1.mlp.fc2.weight"], weight)


def test_half_precision_weights_fold_in_single():
    checkpoint = {
        key: value.half() for key, value in timm_vit(init_values=0.3).state_dict().items()
    }
    converted, _ = convert_vit_checkpoint(checkpoint, our_vit())
    exact = checkpoint["blocks.0.attn.proj.weight"].float() * checkpoint["blocks.0.ls1.gamma"][0]
    assert torch.equal(converted["blocks.0.attn.proj.weight"], exact)


def test_wrappers_are_found():
    checkpoint = {f"module.encoder.{k}": v for k, v in timm_vit().state_dict().items()}
    _, report = convert_vit_checkpoint(checkpoint, our_vit())
    assert report.problems() == []
    assert report.source == "timm, under module.encoder."


def test_class_token_row_comes_and_goes():
    with_token, without = timm_vit().state_dict(), timm_vit(class_token=False, global_pool="avg")
    converted, report = convert_vit_checkpoint(with_token, our_vit(pretrain_use_cls_token=False))
    assert not report.problems()
    assert torch.equal(converted["pos_embed"], with_token["pos_embed"][:, 1:])
    converted, report = convert_vit_checkpoint(without.state_dict(), our_vit())
    assert not report.problems()
    assert torch.equal(converted["pos_embed"][:, 1:], without.state_dict()["pos_embed"])
    assert not converted["pos_embed"][:, 0].any()


def test_relative_positions_are_resized():
    source, target = our_vit(img_size=64, rel_pos_zero_init=False), our_vit()
    converted, report = convert_vit_checkpoint(plain_vit_state_dict(source), target)
    assert report.problems() == []
    assert report.resized["blocks.0.attn.rel_pos_h"] == ((15, 8), (31, 8))
    table = source.blocks[0].attn.rel_pos_h.detach()
    # Doubling the table: output i lies at (i + 0.5) * 15 / 31 - 0.5 of the source.
    position = (10 + 0.5) * 15 / 31 - 0.5
    low = int(position)
    expected = table[low] + (position - low) * (table[low + 1] - table[low])
    torch.testing.assert_close(converted["blocks.0.attn.rel_pos_h"][10], expected)


def test_relative_positions_that_some_blocks_lack_are_missing():
    state = plain_vit_state_dict(our_vit())
    del state["blocks.1.attn.rel_pos_w"]
    _, report = convert_vit_checkpoint(state, our_vit())
    assert report.problems() == ["missing blocks.1.attn.rel_pos_w"]


def test_wrong_shapes_missing_and_unexpected_keys_are_named_unless_allowed():
    checkpoint = timm_vit().state_dict()
    checkpoint["blocks.0.mlp.fc1.weight"] = torch.zeros(64, 32)
    checkpoint["blocks.0.extra"] = torch.zeros(32)
    del checkpoint["blocks.1.attn.proj.bias"]
    converted, report = convert_vit_checkpoint(checkpoint, our_vit())
    assert report.problems() == [
        "missing blocks.1.attn.proj.bias",
        "unexpected blocks.0.extra",
        "blocks.0.mlp.fc1.weight is (64, 32), but (128, 32) in the model",
    ]
    assert "blocks.0.mlp.fc1.weight" not in converted
    assert report.problems(["blocks.*.proj.bias", "*extra", "*fc1*"]) == []
    assert len(report.problems(["*extra"])) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"depth": 3},
            ["depth is 2 in the weights, but 3 in the model", "missing blocks.2.norm1.bias"],
        ),
        ({"embed_dim": 64}, ["embed_dim is 32 in the weights, but 64 in the model", "(2x)"]),
        ({"mlp_ratio": 2.0}, ["mlp_ratio is 4.0 in the weights, but 2.0 in the model"]),
        ({"qkv_bias": False}, ["qkv_bias is True in the weights, but False in the model"]),
        ({"in_chans": 4}, ["in_chans is 3 in the weights, but 4 in the model"]),
        ({"use_abs_pos": False}, ["unexpected pos_embed"]),
    ],
)
def test_a_vit_of_another_size_is_told_by_its_sizes(options, words):
    _, report = convert_vit_checkpoint(timm_vit().state_dict(), our_vit(**options))
    problems = "; ".join(report.problems())
    assert [word for word in words if word not in problems] == []


@pytest.mark.parametrize(
    "options",
    [
        {"use_rel_pos": False},
        {"mlp_ratio": 4304 / 1152, "embed_dim": 1152, "depth": 1, "num_heads": 18},
        {"window_size": 3, "window_block_indexes": [0], "qkv_bias": False, "in_chans": 1},
        {"use_abs_pos": False, "num_heads": 2},
        {"pretrain_use_cls_token": False, "patch_size": 16, "embed_dim": 1280, "num_heads": 16},
    ],
)
def test_weights_describe_the_vit_they_are_of(options):
    with torch.device("meta"):
        vit = our_vit(**options)
        arguments = describe_vit(vit.state_dict())
        arguments.setdefault("img_size", 128)
        if "pretrain_img_size" not in arguments:
            assert options["use_abs_pos"] is False
        again = Dr2NetViT(**arguments)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (vit, again)]
    assert shapes[0] == shapes[1]
    if arguments["use_rel_pos"]:
        heads = [model.blocks[0].attn.num_heads for model in (vit, again)]
        windows = [[block.window_size for block in model.blocks] for model in (vit, again)]
        assert heads[0] == heads[1]
        assert windows[0] == windows[1]


def test_plain_state_dict_has_the_parameters_alone():
    vit = our_vit()
    assert plain_vit_state_dict(vit).keys() == dict(vit.named_parameters()).keys()
    vit.load_state_dict(plain_vit_state_dict(our_vit()), strict=True)


def test_coefficients_go_to_a_vit_that_has_them_and_elsewhere_only_at_1_0():
    ours, plain = our_vit(), timm_vit(class_token=False, global_pool="avg")
    ours.blocks.stream_range.widen(3.0)
    state = ours.state_dict()
    _, report = convert_vit_checkpoint(state, plain)
    assert report.dropped["blocks.coefficients.beta"] == "(1, 0) is the plain network"
    assert len(redundant_scalars(state)) == 4
    # One pair for each function.
    ours.coefficients.set([1.0, 0.5, 1.0, 0.5], [0.0, 0.5, 0.0, 0.5])
    state = ours.state_dict()
    assert len(redundant_scalars(state)) == 2
    _, report = convert_vit_checkpoint(state, plain)
    assert "unexpected blocks.coefficients.alpha" in report.problems()
    again = our_vit()
    converted, report = convert_vit_checkpoint(state, again)
    assert report.problems() == []
    again.load_state_dict(converted)
    assert again.coefficients.values == ours.coefficients.values


def test_a_detector_is_matched_name_by_name():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 1)})
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    converted, report = convert_detector_checkpoint(state, model)
    assert converted.keys() == model.state_dict().keys()
    assert report.problems() == []
    del state["module.b.bias"]
    state |= {"module.pixel_mean": torch.ones(3), "module.c": torch.ones(3)}
    state["module.a.weight"] = torch.ones(3, 2)
    _, report = convert_detector_checkpoint(state, model)
    assert report.dropped == {"pixel_mean": "the config determines it"}
    assert report.problems() == [
        "missing b.bias", "unexpected c", "a.weight is (3, 2), but (2, 2) in the model",
    ]  # fmt: skip


def test_the_plain_vit_in_a_detector_is_found():
    state = {f"backbone.net.{key}": value for key, value in our_vit().state_dict().items()}
    state["roi_heads.box_head.fc1.weight"] = torch.ones(1)
    found = find_plain_vit(state)
    assert found.prefix == "backbone.net."
    _, report = convert_vit_checkpoint(state, our_vit())
    assert report.problems() == []
    assert list(report.dropped) == ["roi_heads.box_head.fc1.weight"]
