"""The plain Vision Transformer of ViTDet with reversible blocks.

Argument and parameter names are those of Detectron2's ``ViT``, so that its configs and checkpoints
carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dr2net_d2.core.attention import (
    Attention,
    absolute_positions,
    window_partition,
    window_unpartition,
)
from dr2net_d2.core.coefficients import Coefficients
from dr2net_d2.core.reversible import ReversibleSequence


class PatchEmbed(nn.Module):
    """(N, in_chans, H, W) -> (N, H / patch_size, W / patch_size, embed_dim)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(
                f"image of {h} x {w} px does not divide into patches of {self.patch_size} px; "
                f"pad both sides to a multiple of {self.patch_size}"
            )
        return self.proj(x).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al., arXiv 1603.09382), scaled to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Block(nn.Module):
    """The two residual functions of a transformer block, without their shortcuts.

    Branch 0 is attention, branch 1 the MLP; each includes its LayerNorm and drop path.
    ``ReversibleSequence`` adds the shortcuts.
    """

    branches = 2

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        input_size: tuple[int, int] = (14, 14),
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias,
            use_rel_pos,
            rel_pos_zero_init,
            (window_size, window_size) if window_size else input_size,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.window_size = window_size

    def forward(self, x: Tensor, branch: int) -> Tensor:
        if branch == 1:
            return self.drop_path(self.mlp(self.norm2(x)))
        size = (x.shape[1], x.shape[2])
        x = self.norm1(x)
        if self.window_size:
            x = window_unpartition(self.attn(window_partition(x, self.window_size)), size)
        else:
            x = self.attn(x)
        return self.drop_path(x)


class Dr2NetViT(nn.Module):
    """ViTDet's plain ViT backbone as a reversible dual-residual network.

    At coefficients (1, 0), where it starts, it is exactly the plain ViT; ``coefficients.set`` moves
    it. Arguments that Detectron2's ``ViT`` has mean the same here.

    Args:
        img_size: side of the image, in pixels, that the relative position tables of global
            attention are made for; at other sizes they are interpolated.
        patch_size: side of a patch, in pixels.
        pretrain_img_size: side of the pretraining images, in pixels; sizes the absolute position
            table.
        pretrain_use_cls_token: whether that table has a leading row for a class token.
        window_size: side of the windows, in tokens, in the blocks of ``window_block_indexes``.
        residual_block_indexes: must be empty; convolutional blocks are not supported.
        reversible: False stores activations as an ordinary network does, with the same arithmetic.
        arithmetic, first_state, output: see ``ReversibleSequence``.

    Shape: (N, in_chans, H, W), H and W multiples of patch_size ->
    {out_feature: (N, embed_dim, H / patch_size, W / patch_size)}.

    Raises:
        ValueError: sizes that do not fit together, with the value and what is allowed.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
        reversible: bool = True,
        arithmetic: str = "exact",
        first_state: str = "copy",
        output: str = "last",
    ) -> None:
        super().__init__()
        for name, side in (("img_size", img_size), ("pretrain_img_size", pretrain_img_size)):
            if patch_size < 1 or side < patch_size:
                raise ValueError(
                    f"{name} {side} px with patch_size {patch_size} px leaves no whole patch; "
                    f"{name} must be at least patch_size, and patch_size at least 1"
                )
        if residual_block_indexes:
            raise ValueError(
                f"residual_block_indexes {list(residual_block_indexes)} asks for convolutional "
                "blocks, which Dr2NetViT does not have; leave it empty"
            )
        if window_block_indexes and (window_size < 1 or max(window_block_indexes) >= depth):
            raise ValueError(
                f"window_block_indexes {list(window_block_indexes)} needs window_size of at least "
                f"1 (is {window_size}) and indexes below depth {depth}"
            )
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.out_feature = out_feature
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed: nn.Parameter | None = None
        if use_abs_pos:
            positions = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        side = img_size // patch_size
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = ReversibleSequence(
            [
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    rates[i],
                    norm_layer,
                    act_layer,
                    use_rel_pos,
                    rel_pos_zero_init,
                    window_size if i in window_block_indexes else 0,
                    (side, side),
                )
                for i in range(depth)
            ],
            Coefficients(),
            reversible,
            arithmetic,
            first_state,
            output,
        )
        self.apply(_init_weights)

    @property
    def coefficients(self) -> Coefficients:
        return self.blocks.coefficients

    @property
    def reversible(self) -> bool:
        return self.blocks.reversible

    @reversible.setter
    def reversible(self, value: bool) -> None:
        self.blocks.reversible = value

    @property
    def arithmetic(self) -> str:
        return self.blocks.arithmetic

    @arithmetic.setter
    def arithmetic(self, value: str) -> None:
        self.blocks.arithmetic = value

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + absolute_positions(self.pos_embed, size, self.pretrain_use_cls_token)
        return {self.out_feature: self.blocks(x).permute(0, 3, 1, 2)}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
