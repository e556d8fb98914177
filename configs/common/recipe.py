"""Optimizer, schedule and trainer of ViTDet (arXiv 2203.16527, appendix), for ViT-B, L and H."""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dr2net_d2.d2.zoo import zoo_config

MAE = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_{}.pth"
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_{}.pth"

train = zoo_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = MAE.format("base")
train.max_iter = 184375  # 100 epochs

optimizer = zoo_config("common/optim.py").AdamW
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates="${train.max_iter}"
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)


def use_vit_tiny(model, train, optimizer):
    """Turn a recipe for ViT-B into one for ViT-Ti and DeiT's weights, in place; not the paper's."""
    _use_vit(model, optimizer, 192, depth=12, num_heads=3, drop_path_rate=0.0, lr_decay_rate=0.8)
    train.init_checkpoint = DEIT.format("tiny_patch16_224-a1311bcf")


def use_vit_small(model, train, optimizer):
    """Turn a recipe for ViT-B into one for ViT-S and DeiT's weights, in place; not the paper's."""
    _use_vit(model, optimizer, 384, depth=12, num_heads=6, drop_path_rate=0.0, lr_decay_rate=0.8)
    train.init_checkpoint = DEIT.format("small_patch16_224-cd65a155")


def use_vit_large(model, train, optimizer):
    """Turn a recipe for ViT-B into that for ViT-L, in place."""
    _use_vit(model, optimizer, 1024, depth=24, num_heads=16, drop_path_rate=0.4, lr_decay_rate=0.8)
    train.init_checkpoint = MAE.format("large")


def use_vit_huge(model, train, optimizer, lr_multiplier):
    """Turn a recipe for ViT-B into that for ViT-H, in place."""
    _use_vit(model, optimizer, 1280, depth=32, num_heads=16, drop_path_rate=0.5, lr_decay_rate=0.9)
    train.init_checkpoint = MAE.format("huge_p14to16")
    optimizer.params.overrides = {}
    optimizer.params.weight_decay_norm = None
    # 75 epochs.
    train.max_iter = 138281
    lr_multiplier.scheduler.milestones = [122916, 133159]
    lr_multiplier.warmup_length = 250 / train.max_iter


def _use_vit(model, optimizer, embed_dim, *, depth, num_heads, drop_path_rate, lr_decay_rate):
    # Global attention in the last block of each quarter.
    windows = [i for i in range(depth) if (i + 1) % (depth // 4)]
    model.backbone.net.update(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        window_block_indexes=windows,
    )
    optimizer.params.lr_factor_func = partial(
        get_vit_lr_decay_rate, num_layers=depth, lr_decay_rate=lr_decay_rate
    )
