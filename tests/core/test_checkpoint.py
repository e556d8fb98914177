"""Plain ViT checkpoints, with timm's real models as the source."""

import timm
import torch
import torch.nn.functional as F

from dr2net_d2.core import Dr2NetViT
from dr2net_d2.core.checkpoint import convert_vit_checkpoint, plain_vit_state_dict


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


def test_timm_classifier_every_key_accounted_for():
    checkpoint = timm_vit(num_classes=10).state_dict()
    vit = our_vit()
    converted, report = convert_vit_checkpoint(checkpoint, vit)
    assert report.problems() == []
    assert set(report.loaded) == set(converted)
    assert sorted(report.unexpected) == [
        "cls_token", "head.bias", "head.weight", "norm.bias", "norm.weight",
    ]  # fmt: skip
    assert all(key.endswith(("rel_pos_h", "rel_pos_w")) for key in report.missing)
    assert set(checkpoint) == set(report.loaded) | set(report.unexpected)
    vit.load_state_dict(converted, strict=False)
    assert torch.equal(vit.blocks[1].mlp.fc2.weight, checkpoint["blocks.1.mlp.fc2.weight"])


def test_wrappers_are_stripped():
    checkpoint = {f"module.encoder.{k}": v for k, v in timm_vit().state_dict().items()}
    _, report = convert_vit_checkpoint(checkpoint, our_vit())
    assert report.problems() == []


def test_position_tables_are_resized():
    checkpoint = timm_vit().state_dict()
    converted, report = convert_vit_checkpoint(checkpoint, our_vit(pretrain_img_size=96))
    assert report.resized == {"pos_embed": ((1, 65, 32), (1, 145, 32))}
    table = checkpoint["pos_embed"]
    grid = table[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(12, 12), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(converted["pos_embed"][:, 1:], expected)
    assert torch.equal(converted["pos_embed"][:, 0], table[:, 0])


def test_class_token_row_comes_and_goes():
    with_token, without = timm_vit().state_dict(), timm_vit(class_token=False, global_pool="avg")
    converted, report = convert_vit_checkpoint(with_token, our_vit(pretrain_use_cls_token=False))
    assert not report.problems()
    assert torch.equal(converted["pos_embed"], with_token["pos_embed"][:, 1:])
    converted, report = convert_vit_checkpoint(without.state_dict(), our_vit())
    assert not report.problems()
    assert torch.equal(converted["pos_embed"][:, 1:], without.state_dict()["pos_embed"])


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


def test_wrong_shapes_missing_and_unexpected_keys_are_named():
    checkpoint = timm_vit().state_dict()
    checkpoint["blocks.0.mlp.fc1.weight"] = torch.zeros(64, 32)
    checkpoint["blocks.7.norm1.weight"] = torch.zeros(32)
    del checkpoint["blocks.1.attn.proj.bias"]
    converted, report = convert_vit_checkpoint(checkpoint, our_vit())
    assert report.problems() == [
        "missing blocks.1.attn.proj.bias",
        "unexpected blocks.7.norm1.weight",
        "blocks.0.mlp.fc1.weight is (64, 32), the model's (128, 32)",
    ]
    assert "blocks.0.mlp.fc1.weight" not in converted


def test_plain_state_dict_has_the_parameters_alone():
    vit = our_vit()
    assert plain_vit_state_dict(vit).keys() == dict(vit.named_parameters()).keys()
    vit.load_state_dict(plain_vit_state_dict(our_vit()), strict=True)
