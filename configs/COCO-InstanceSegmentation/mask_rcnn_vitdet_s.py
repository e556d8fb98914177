from ..common.recipe import use_vit_small
from .mask_rcnn_vitdet_b import dataloader, dr2net, lr_multiplier, model, optimizer, train

use_vit_small(model, train, optimizer)
train.output_dir = "output/mask_rcnn_vitdet_s"
