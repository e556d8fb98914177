"""Formats of pretrained plain ViTs: how to recognise them, their names, what ViTDet cannot use.

All use timm's names, as Detectron2's ViTDet does, with few exceptions: ``patch_embed.proj``,
``pos_embed``, ``blocks.N.{norm1,attn.{qkv,proj},norm2,mlp.{fc1,fc2}}``. Where names and shapes say
nothing, the network is assumed to be like ViTDet: GELU (SigLIP 2 has an approximation of it), norms
in front of attention and MLP, no rotary positions beside the table, the usual number of heads.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dr2net_d2.weights.resampling import resize_grid, split_positions

STEM = "patch_embed.proj.weight"

MAX_PREFIX_TOKENS = 8
"""Maximum rows of a position table before its grid, for class, distillation, register tokens."""


@dataclass(frozen=True)
class CheckpointFormat:
    """The format of the checkpoints of one or more projects.

    Attributes:
        name: the name of the projects, as in reports.
        marks: patterns; a ViT with a key that matches one of them has this format.
        resize: (grid, side) -> grid, the projects' way to resize position tables; from
            ``(1, C, S, S)`` to ``(1, C, side, side)``.
        renames: pairs of a regular expression and its replacement, from their names to timm's.
    """

    name: str
    marks: tuple[str, ...]
    resize: Callable[[Tensor, int], Tensor] = resize_grid
    renames: tuple[tuple[str, str], ...] = ()

    def rename(self, key: str) -> str:
        """timm's name for a key."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


_ANTIALIASED = partial(resize_grid, antialias=True)
# DINOv2 trains with blocks.<chunk>.<block>, where <block> is the index in the whole network.
_CHUNKS = (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")

FORMATS = (
    # SAM's encoder is a ViTDet and does not resize tables.
    CheckpointFormat("SAM", ("*.mlp.lin1.weight",), renames=((r"\.mlp\.lin", ".mlp.fc"),)),
    CheckpointFormat("MAE with its decoder", ("decoder_*",)),
    CheckpointFormat("DINOv2 with registers", ("register_tokens",), _ANTIALIASED, (_CHUNKS,)),
    CheckpointFormat(
        "DINOv2",
        ("mask_token", "blocks.*.*.norm1.weight"),
        partial(resize_grid, offset=0.1),
        (_CHUNKS,),
    ),
    # Classifiers finetuned with MAE or DeiT have the same names.
    CheckpointFormat(
        "timm",
        ("head*", "fc_norm.*", "reg_token", "neck.*", "attn_pool.*", "*.ls1.gamma", "*.gamma_1"),
        _ANTIALIASED,
        # The files of DeiT III.
        ((r"\.gamma_([12])$", r".ls\1.gamma"),),
    ),
    CheckpointFormat("MAE or Detectron2", ("*",)),
)
"""In order of precedence: the first format with a matching mark counts."""

UNUSED = {
    "prefix token; ViTDet has patch tokens only": (
        "cls_token",
        "dist_token",
        "reg_token",
        "register_tokens",
    ),
    "stands for masked patches in pretraining": ("mask_token",),
    "norm after the last block; ViTDet has none": ("norm.*", "fc_norm.*"),
    "classifier": ("head.*", "head_dist.*", "attn_pool.*"),
    "decoder of the pretraining": ("decoder_*",),
    "neck for masks": ("neck.*",),
}
"""Keys that ViTDet does not need: reason -> patterns."""

FOREIGN = {
    "a gated MLP (SwiGLU), as in DINOv2 giant and EVA-02": (
        "*.mlp.w12.*",
        "*.mlp.w1.*",
        "*.mlp.fc1_g.*",
    ),
    "queries, keys and values with weights or biases of their own, as in EVA and BEiT": (
        "*.attn.q_proj.*",
        "*.attn.q_bias",
    ),
    "norms of queries and keys": ("*.attn.q_norm.*",),
    "norms within attention or MLP": ("*.attn.norm.*", "*.mlp.norm.*"),
    "a norm before the first block, as in CLIP": ("*norm_pre.*", "*ln_pre.*"),
    "biases for relative positions, as in BEiT and Swin": ("*relative_position_bias_table",),
    "rotary positions": ("*rope*",),
    "pooling attention, as in MViTv2": ("*.attn.pool_*",),
    "the stages of a Swin Transformer": ("*layers.0.blocks.0.*",),
    "the stages of a ResNet": ("*layer1.0.*", "*res2.0.*", "*res2_0_*"),
}
"""Parts that our block does not have -> patterns of their keys."""


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key matches one of the patterns, which may have *, ? and [...]."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def why_unused(name: str) -> str | None:
    """Why ViTDet does not need a key of a pretrained ViT; None if it is not known to be one."""
    return next((why for why, patterns in UNUSED.items() if matches(name, patterns)), None)


def foreign_parts(state: Mapping[str, Tensor]) -> list[str]:
    """Phrases for parts of a network that our block does not have, each with a key as evidence."""
    phrases = []
    for part, patterns in FOREIGN.items():
        key = next((key for key in state if matches(key, patterns)), None)
        if key is not None:
            phrases.append(f"{key} shows {part}")
    fc1, fc2 = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[1]:
        phrases.append("blocks.0.mlp.fc1, twice as wide as fc2 takes, shows a gated MLP (SwiGLU)")
    return phrases


@dataclass(frozen=True)
class PlainViT:
    """The plain ViT inside a checkpoint.

    Attributes:
        prefix: prefix of its keys, such as "" or "image_encoder.".
        format: format of its keys.
        keys: timm's name -> key of the checkpoint.
        state: timm's name -> tensor.
    """

    prefix: str
    format: CheckpointFormat
    keys: dict[str, str]
    state: dict[str, Tensor]


def find_plain_vit(checkpoint: Mapping[str, Tensor]) -> PlainViT:
    """Find the plain ViT in a checkpoint.

    Raises:
        ValueError: there is none, or there are several.
    """
    stems = [key.removesuffix(STEM) for key in checkpoint if key.endswith(STEM)]
    prefixes = [
        stem
        for stem in stems
        if stem[-1:] in ("", ".")
        and checkpoint[f"{stem}{STEM}"].dim() == 4
        and any(key.startswith(f"{stem}blocks.") for key in checkpoint)
    ]
    if len(prefixes) > 1:
        raise ValueError(
            f"there are {len(prefixes)} ViTs among its keys, under {', '.join(prefixes)}; keep the "
            "keys of one"
        )
    if not prefixes:
        hints = foreign_parts(checkpoint) or [f"its first key is {next(iter(checkpoint))}"]
        raise ValueError(
            f"there is no plain ViT ({STEM} with blocks beside it) among its {len(checkpoint)} "
            f"keys; {'; '.join(hints)}"
        )
    (prefix,) = prefixes
    if not any(matches(key, (f"{prefix}pos_embed", "*.rel_pos_h")) for key in checkpoint):
        hints = foreign_parts(checkpoint) or ["rotary ones, as in DINOv3, leave no keys"]
        raise ValueError(
            f"its ViT has neither {prefix}pos_embed nor relative positions of our block's kind; "
            f"{'; '.join(hints)}"
        )
    inside = {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}
    vit_format = next(f for f in FORMATS if any(matches(name, f.marks) for name in inside))
    keys = {vit_format.rename(name): key for name, key in inside.items()}
    return PlainViT(prefix, vit_format, keys, {name: checkpoint[key] for name, key in keys.items()})


def describe_vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``Dr2NetViT`` that follow from the weights of a plain ViT.

    The number of heads follows from relative positions; without these, it is the usual one for the
    width. A block has windows if it has fewer relative positions than global attention.

    Args:
        state: timm's name -> tensor; only shapes are used.
    """
    dim, channels, patch_size, _ = state[STEM].shape
    blocks = [int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)]
    depth = max(blocks, default=-1) + 1
    arguments: dict[str, Any] = {
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": 16 if dim in (1280, 1408) else max(dim // 64, 1),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "use_abs_pos": "pos_embed" in state,
    }
    if "blocks.0.mlp.fc2.weight" in state:
        arguments["mlp_ratio"] = _ratio(state["blocks.0.mlp.fc2.weight"].shape[1], dim)
    if "pos_embed" in state:
        parts = split_positions(state["pos_embed"], MAX_PREFIX_TOKENS)
        if parts is not None:
            prefix, grid = parts
            arguments["pretrain_img_size"] = grid.shape[-1] * patch_size
            arguments["pretrain_use_cls_token"] = prefix.shape[1] > 0
    tables = {i: state.get(f"blocks.{i}.attn.rel_pos_h") for i in range(depth)}
    sides = {i: (len(table) + 1) // 2 for i, table in tables.items() if table is not None}
    arguments["use_rel_pos"] = bool(sides)
    if sides:
        largest = max(sides.values())
        windowed = [i for i, side in sides.items() if side < largest]
        arguments["num_heads"] = dim // state[f"blocks.{min(sides)}.attn.rel_pos_h"].shape[1]
        arguments["img_size"] = largest * patch_size
        arguments["window_block_indexes"] = windowed
        arguments["window_size"] = sides[windowed[0]] if windowed else 0
    return arguments


def _ratio(hidden: int, dim: int) -> float:
    """The float r with int(r * dim) == hidden."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
