"""Whose checkpoint is this? What families of plain ViTs name otherwise, add, and cannot be here.

All share the names of timm, which Detectron2's ViTDet has as well: ``patch_embed.proj``,
``pos_embed``, ``blocks.N.{norm1,attn.{qkv,proj},norm2,mlp.{fc1,fc2}}``. What names and shapes do
not show is taken to be as in ViTDet: GELU (SigLIP 2 has an approximation of it), norms in front of
attention and MLP, no rotary positions beside the table, the number of heads.
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

MOST_PREFIX_TOKENS = 8
"""Rows that a position table may have before its grid: class, distillation and register tokens."""


@dataclass(frozen=True)
class Format:
    """A family of checkpoints.

    Attributes:
        name: for people.
        marks: patterns, any of which tells the family by a key of its ViT.
        resize: (grid (1, C, S, S), side) -> (1, C, side, side), its rule for position tables.
        renames: regular expressions and what replaces them, from its names to timm's.
    """

    name: str
    marks: tuple[str, ...]
    resize: Callable[[Tensor, int], Tensor] = resize_grid
    renames: tuple[tuple[str, str], ...] = ()

    def rename(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


_ANTIALIASED = partial(resize_grid, antialias=True)
# DINOv2 trains with blocks.<chunk>.<block>; blocks are numbered through.
_CHUNKS = (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")

FORMATS = (
    # SAM has no rule of its own for tables; its encoder is ViTDet's.
    Format("SAM", ("*.mlp.lin1.weight",), renames=((r"\.mlp\.lin", ".mlp.fc"),)),
    Format("MAE with its decoder", ("decoder_*",)),
    Format("DINOv2 with registers", ("register_tokens",), _ANTIALIASED, (_CHUNKS,)),
    Format(
        "DINOv2",
        ("mask_token", "blocks.*.*.norm1.weight"),
        partial(resize_grid, offset=0.1),
        (_CHUNKS,),
    ),
    # Classifiers finetuned by MAE or DeiT have the same names.
    Format(
        "timm",
        ("head*", "fc_norm.*", "reg_token", "neck.*", "attn_pool.*", "*.ls1.gamma", "*.gamma_1"),
        _ANTIALIASED,
        # DeiT III's own files.
        ((r"\.gamma_([12])$", r".ls\1.gamma"),),
    ),
    Format("MAE or Detectron2", ("*",)),
)
"""The first whose marks are found counts."""

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
"""What stands around the blocks and ViTDet does without: reason -> patterns."""

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
"""What our block has no place for: what it is -> patterns of keys that show it."""


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def why_unused(name: str) -> str | None:
    """Why ViTDet does without a key of a pretrained ViT, or None."""
    return next((why for why, patterns in UNUSED.items() if matches(name, patterns)), None)


def foreign_parts(state: Mapping[str, Tensor]) -> list[str]:
    """One phrase for everything known that our block lacks, with a key that shows it."""
    found = []
    for what, patterns in FOREIGN.items():
        if key := next((key for key in state if matches(key, patterns)), None):
            found.append(f"{key} shows {what}")
    hidden, taken = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if hidden is not None and taken is not None and len(hidden) == 2 * taken.shape[1]:
        found.append("blocks.0.mlp.fc1, twice as wide as fc2 takes, shows a gated MLP (SwiGLU)")
    return found


@dataclass(frozen=True)
class FoundViT:
    """Where in a checkpoint its plain ViT is.

    Attributes:
        prefix: of its keys, such as "" or "image_encoder.".
        family: whose names they are.
        keys: timm's name -> key of the checkpoint.
        state: timm's name -> tensor.
    """

    prefix: str
    family: Format
    keys: dict[str, str]
    state: dict[str, Tensor]


def find_plain_vit(checkpoint: Mapping[str, Tensor]) -> FoundViT:
    """The one plain ViT in a checkpoint.

    Raises:
        ValueError: there is none, or several.
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
        what = foreign_parts(checkpoint) or [f"its first key is {next(iter(checkpoint))}"]
        raise ValueError(
            f"there is no plain ViT ({STEM} with blocks beside it) among its {len(checkpoint)} "
            f"keys; {'; '.join(what)}"
        )
    (prefix,) = prefixes
    if not any(matches(key, (f"{prefix}pos_embed", "*.rel_pos_h")) for key in checkpoint):
        what = foreign_parts(checkpoint) or ["rotary ones, as in DINOv3, leave no keys"]
        raise ValueError(
            f"its ViT has neither {prefix}pos_embed nor relative positions of our block's kind; "
            f"{'; '.join(what)}"
        )
    inside = {key.removeprefix(prefix): key for key in checkpoint if key.startswith(prefix)}
    family = next(f for f in FORMATS if any(matches(name, f.marks) for name in inside))
    keys = {family.rename(name): key for name, key in inside.items()}
    return FoundViT(prefix, family, keys, {name: checkpoint[key] for name, key in keys.items()})


def describe_vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``Dr2NetViT`` that the weights of a plain ViT show, under its names.

    The number of heads shows in relative positions only; without, it is the usual one for the
    width. Windows show where their relative positions are fewer than those of global attention.
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
    if (fc2 := state.get("blocks.0.mlp.fc2.weight")) is not None:
        arguments["mlp_ratio"] = _ratio(fc2.shape[1], dim)
    if "pos_embed" in state and (parts := split_positions(state["pos_embed"], MOST_PREFIX_TOKENS)):
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
    """The float that gives ``hidden`` when it is multiplied by ``dim`` and rounded down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
