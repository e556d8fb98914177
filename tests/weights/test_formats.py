"""Every source of pretrained ViTs: our forward on its weights is that of timm's own model."""

import re
from functools import partial
from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer, vision_transformer_sam
from torch import nn

from dr2net_d2.core import Dr2NetViT
from dr2net_d2.weights.formats import describe_vit, find_plain_vit
from dr2net_d2.weights.plain_vit import convert_vit_checkpoint

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
SAM = {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 256}
MODELS = {
    "vit_base_patch16_224": SMALL,
    "vit_base_patch16_224.mae": SMALL,
    "deit_base_distilled_patch16_224": SMALL,
    "deit3_base_patch16_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch14_dinov2": {**SMALL, "img_size": 224},
    "vit_base_patch14_reg4_dinov2": {**SMALL, "img_size": 224},
    "samvit_base_patch16": SAM,
}


def timm_model(name, **options):
    """timm's model with every parameter random, LayerScale and norms too."""
    model = timm.create_model(name, pretrained=False, **{**MODELS[name], **options}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        scale = re.search(r"norm\w*\.weight|gamma", parameter_name) is not None
        parameter.data = noise + scale
    return model


def patch_tokens(model, images):
    """(N, C, H, W) before the last norm, by timm's code, without its prefix tokens."""
    if isinstance(model, vision_transformer_sam.VisionTransformerSAM):
        model.neck = nn.Identity()
        return model.forward_features(images)
    rows = model.pos_embed.shape[1] - model.patch_embed.num_patches
    model.pos_embed = nn.Parameter(model.pos_embed[:, rows:])
    model.cls_token = model.reg_token = None
    model.num_prefix_tokens, model.norm = 0, nn.Identity()
    model._pos_embed = MethodType(vision_transformer.VisionTransformer._pos_embed, model)
    tokens = model.forward_features(images)
    return tokens.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)


def our_vit(state, **options):
    """Of the arguments that the weights show, but for what timm's models of a name differ in."""
    arguments = describe_vit(find_plain_vit(state).state)
    arguments = {**arguments, "num_heads": 2, **options}
    return Dr2NetViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **arguments).eval()


def loaded(state, **options):
    vit = our_vit(state, **options)
    before = {key: tensor.clone() for key, tensor in state.items()}
    converted, report = convert_vit_checkpoint(state, vit)
    assert all(torch.equal(before[key], state[key]) for key in before)
    assert report.problems() == []
    accounted = [*report.loaded, *report.resized, *report.folded, *report.dropped]
    assert sorted(accounted) == sorted(state)
    parameters = dict(vit.named_parameters()).keys()
    assert sorted([*converted, *report.initialized]) == sorted(parameters)
    vit.load_state_dict(converted, strict=False)
    return vit, report


def assert_same_features(vit, model, side, tolerance=1e-5):
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = patch_tokens(model, images)
    assert expected.std() > 0.1
    for reversible in (False, True):
        vit.reversible = reversible
        found = vit(images)["last_feat"]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_our_forward_is_timms(name):
    model = timm_model(name)
    vit, report = loaded(model.state_dict())
    # The grid is flattened, or loses the distillation token's row.
    assert bool(report.resized) == ("samvit" in name or "distilled" in name)
    assert bool(report.folded) == ("dinov2" in name or "deit3" in name)
    assert_same_features(vit, model, MODELS[name].get("img_size", 224))


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [
        ("vit_base_patch16_224", 320, 16),
        ("deit_base_distilled_patch16_224", 128, 16),
        ("vit_base_patch14_reg4_dinov2", 240, 16),
        ("vit_base_patch14_dinov2", 144, 12),
    ],
)
def test_other_image_and_patch_sizes_are_timms(name, size, patch):
    state = timm_model(name).state_dict()
    other = timm_model(name, img_size=size, patch_size=patch)
    other.load_state_dict(vision_transformer.checkpoint_filter_fn(dict(state), other))
    vit, report = loaded(state, pretrain_img_size=size, patch_size=patch)
    assert "pos_embed" in report.resized
    # timm takes the pseudo-inverse in float32.
    assert_same_features(vit, other, size, tolerance=1e-5 if f"patch{patch}" in name else 1e-4)


# What the authors' own files have, block by block.
LINEAR = "{}.weight {}.bias"
BLOCK = [
    LINEAR.replace("{}", f"B.{layer}") for layer in ("norm1", "attn.qkv", "attn.proj", "norm2")
]
MLP = [LINEAR.replace("{}", f"B.mlp.{layer}") for layer in ("fc1", "fc2")]
AROUND = ["cls_token pos_embed", *(LINEAR.replace("{}", k) for k in ("patch_embed.proj", "norm"))]


def names(templates, blocks, depth):
    """The keys of templates with B for ``blocks``, a format of the block's number."""
    words = " ".join(templates).split()
    around = [word for word in words if not word.startswith("B.")]
    numbered = (word for word in words if word.startswith("B."))
    return {*around, *(f"{blocks.format(i)}{w[1:]}" for w in numbered for i in range(depth))}


def renamed(state, *rules):
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, key): tensor for key, tensor in state.items()}
    return state


def test_maes_own_files():
    model = timm_model("vit_base_patch16_224.mae")
    state = dict(model.state_dict())
    assert state.keys() == names([*AROUND, *BLOCK, *MLP], "blocks.{}", 2)
    vit, report = loaded(state)
    assert (report.source, list(report.dropped)) == (
        "MAE or Detectron2",
        ["cls_token", "norm.weight", "norm.bias"],
    )
    assert_same_features(vit, model, 224)

    decoder = ["mask_token decoder_pos_embed", *(f"decoder_{x}.weight decoder_{x}.bias"
               for x in ("embed", "norm", "pred"))]  # fmt: skip
    keys = names(decoder, "", 0) | names([*BLOCK, *MLP], "decoder_blocks.{}", 8)
    state |= {key: torch.ones(1) for key in keys}
    vit, report = loaded(state, pretrain_img_size=320)
    assert keys < report.dropped.keys()
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(20, 20), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(vit.pos_embed[:, 1:], expected)
    assert torch.equal(vit.pos_embed[:, 0], state["pos_embed"][:, 0])


DINOV2 = [*AROUND, "mask_token", *BLOCK, *MLP, "B.ls1.gamma B.ls2.gamma"]


@pytest.mark.parametrize(
    ("blocks", "rule"),
    [("blocks.{}", (r"^blocks\.", "blocks.")), ("blocks.0.{}", (r"^blocks\.", "blocks.0."))],
)
def test_dinov2s_own_files(blocks, rule):
    model = timm_model("vit_base_patch14_dinov2")
    state = renamed({**model.state_dict(), "mask_token": torch.ones(1, 32)}, rule)
    assert state.keys() == names(DINOV2, blocks, 2)
    vit, report = loaded(
        {f"backbone.{k}": v for k, v in state.items()} | {"dino_head.w": state["norm.bias"]}
    )
    assert report.source == "DINOv2, under backbone."
    assert report.dropped["dino_head.w"] == "outside the ViT, which is under backbone."
    assert_same_features(vit, model, 224)

    vit, _ = loaded(state, pretrain_img_size=140)
    grid = state["pos_embed"][:, 1:].reshape(1, 16, 16, 32).permute(0, 3, 1, 2)
    scale = (10 + 0.1) / 16
    expected = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    torch.testing.assert_close(vit.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))


def test_dinov2s_own_files_with_registers():
    model = timm_model("vit_base_patch14_reg4_dinov2")
    state = dict(model.state_dict())
    table = torch.cat([torch.ones(1, 1, 32), state["pos_embed"]], dim=1)
    state |= {"register_tokens": state.pop("reg_token"), "pos_embed": table}
    state["mask_token"] = torch.ones(1, 32)
    assert state.keys() == names([*DINOV2, "register_tokens"], "blocks.{}", 2)
    vit, report = loaded(state)
    assert report.source == "DINOv2 with registers"
    assert report.dropped["register_tokens"].startswith("prefix token")
    assert_same_features(vit, model, 224)
    vit, _ = loaded(state, pretrain_img_size=140)
    torch.testing.assert_close(vit.pos_embed, resample_abs_pos_embed(table, [10, 10]))


SAM_KEYS = [
    "pos_embed patch_embed.proj.weight patch_embed.proj.bias",
    "neck.0.weight neck.1.weight neck.1.bias neck.2.weight neck.3.weight neck.3.bias",
    *BLOCK,
    "B.attn.rel_pos_h B.attn.rel_pos_w B.mlp.lin1.weight B.mlp.lin1.bias B.mlp.lin2.weight "
    "B.mlp.lin2.bias",
]


def test_sams_own_files():
    model = timm_model("samvit_base_patch16")
    encoder = renamed(model.state_dict(), (r"\.mlp\.fc", ".mlp.lin"))
    assert encoder.keys() == names(SAM_KEYS, "blocks.{}", 3)
    state = {f"image_encoder.{key}": tensor for key, tensor in encoder.items()}
    state |= {"prompt_encoder.no_mask_embed.weight": torch.ones(1, 256),
              "mask_decoder.iou_token.weight": torch.ones(1, 256)}  # fmt: skip
    back = vision_transformer_sam.checkpoint_filter_fn(dict(state), model)
    assert back.keys() == model.state_dict().keys()
    vit, report = loaded(state)
    assert report.source == "SAM, under image_encoder."
    assert report.resized == {"image_encoder.pos_embed": ((1, 16, 16, 32), (1, 256, 32))}
    assert vit.blocks[0].window_size == 14
    assert vit.blocks[2].window_size == 0
    assert_same_features(vit, model, 256)


def test_sam_for_larger_images_goes_the_way_of_vitdet():
    state = renamed(timm_model("samvit_base_patch16").state_dict(), (r"\.mlp\.fc", ".mlp.lin"))
    vit, report = loaded(state, img_size=384, pretrain_img_size=384)
    grid = F.interpolate(state["pos_embed"].permute(0, 3, 1, 2), size=(24, 24), mode="bicubic")
    assert torch.equal(vit.pos_embed, grid.flatten(2).transpose(1, 2))
    shapes = {key: new for key, (_, new) in report.resized.items()}
    assert shapes == {"pos_embed": (1, 576, 32)} | {
        f"blocks.2.attn.rel_pos_{axis}": (47, 16) for axis in "hw"
    }


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_giant_patch14_dinov2", {}, ["fc1, twice as wide as fc2 takes", "SwiGLU"]),
        ("eva02_base_patch14_224", {}, ["blocks.0.mlp.fc1_g.weight", "SwiGLU", "attn.q_proj.w"]),
        ("vit_base_patch16_clip_224", {}, ["norm_pre.weight", "CLIP"]),
        ("vit_base_patch16_224", {"qk_norm": True}, ["attn.q_norm.weight", "queries and keys"]),
        ("vit_base_patch16_224", {"scale_mlp_norm": True}, ["mlp.norm.weight", "norms within"]),
    ],
)
def test_what_does_not_fit_the_block_is_refused_by_key(name, options, words):
    sizes = {"embed_dim": 192, "num_heads": 4, "depth": 2}
    state = timm.create_model(name, pretrained=False, **sizes, **options).state_dict()
    _, report = convert_vit_checkpoint(state, our_vit(state))
    problems = "; ".join(report.problems())
    assert [word for word in words if word not in problems] == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet18", {}, ["no plain ViT", "layer1.0.conv1.weight", "ResNet"]),
        ("beit_base_patch16_224", {}, ["blocks.0.attn.q_bias", "relative_position_bias_table"]),
        ("vit_base_patch16_rope_224", SMALL, ["neither pos_embed nor", "rotary ones"]),
        ("vit_base_patch16_dinov3", SMALL, ["neither pos_embed nor", "DINOv3"]),
        ("swin_tiny_patch4_window7_224", {}, ["no plain ViT", "layers.0.blocks.0", "Swin"]),
    ],
)
def test_other_architectures_are_refused(name, options, words):
    state = timm.create_model(name, pretrained=False, **options).state_dict()
    with pytest.raises(ValueError) as caught:
        convert_vit_checkpoint(state, Dr2NetViT(img_size=32, embed_dim=32, num_heads=2))
    assert [word for word in words if word not in str(caught.value)] == []


def test_two_vits_in_one_checkpoint_are_refused():
    state = timm_model("vit_base_patch16_224").state_dict()
    both = {
        f"{who}.{key}": tensor for who in ("student", "teacher") for key, tensor in state.items()
    }
    with pytest.raises(ValueError, match=r"2 ViTs .* under student\., teacher\."):
        find_plain_vit(both)
