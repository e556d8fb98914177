"""The quick Mask R-CNN as a LazyConfig: Detectron2's ViTDet detector around the micro ViT."""

from functools import partial

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ..common.coco_lsj import dataloader
from ..common.mask_rcnn_vitdet import dr2net, model
from ..common.recipe import optimizer, train

image_size = 128

model.pixel_mean, model.pixel_std = [127.5] * 3, [64.0] * 3
model.backbone.update(
    out_channels=64, scale_factors=(2.0, 1.0, 0.5), top_block=None, square_pad=image_size
)
model.backbone.net.update(
    img_size=256,
    patch_size=8,
    embed_dim=96,
    depth=8,
    num_heads=3,
    drop_path_rate=0.0,
    use_rel_pos=False,
    window_size=8,
    window_block_indexes=[0, 1, 2, 4, 5, 6],
    pretrain_img_size=64,
)
model.proposal_generator.update(
    in_features=["p2", "p3", "p4"], pre_nms_topk=(500, 300), post_nms_topk=(300, 100)
)
model.proposal_generator.head.update(in_channels=64, conv_dims=[-1])
model.proposal_generator.anchor_generator.update(
    sizes=[[10], [20], [40]], aspect_ratios=[0.6, 1.0, 1.6], strides=[4, 8, 16]
)
model.roi_heads.update(
    num_classes=10,
    batch_size_per_image=128,
    box_in_features=["p2", "p3"],
    mask_in_features=["p2", "p3"],
)
model.roi_heads.box_pooler.scales = model.roi_heads.mask_pooler.scales = (1 / 4, 1 / 8)
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=64, height=7, width=7), conv_dims=[], fc_dims=[512, 512]
)
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=512)
model.roi_heads.mask_head.update(
    input_shape=ShapeSpec(channels=64, height=14, width=14), conv_dims=[64] * 3
)

dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.train.dataset.names = "small_digits_train_n200_s128_d6"
# A mirrored digit is another sign.
dataloader.train.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=image_size)]
dataloader.test.num_workers = 0
dataloader.test.dataset.names = "small_digits_val_n50_s128_d6"
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=image_size)]

optimizer.update(lr=0.003, weight_decay=0.05)
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=8, lr_decay_rate=0.7)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=1 / 3,
    warmup_factor=0.1,
)
train.update(
    device="cpu",
    init_checkpoint="dr2net_d2://micro_vit",
    max_iter=60,
    eval_period=0,
    seed=1,
    output_dir="output/quick/lazy_mask_rcnn",
    expected_results=[["bbox", "AP50", 46.8, 12.0], ["segm", "AP50", 38.8, 12.0]],
)
train.amp.enabled = False
