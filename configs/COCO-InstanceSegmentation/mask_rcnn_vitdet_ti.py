from ..common.recipe import use_vit_tiny
from .mask_rcnn_vitdet_b import dataloader, dr2net, lr_multiplier, model, optimizer, train

use_vit_tiny(model, train, optimizer)
train.output_dir = "output/mask_rcnn_vitdet_ti"
