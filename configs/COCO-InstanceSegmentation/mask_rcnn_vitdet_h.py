from ..common.recipe import use_vit_huge
from .mask_rcnn_vitdet_b import dataloader, dr2net, lr_multiplier, model, optimizer, train

use_vit_huge(model, train, optimizer, lr_multiplier)
train.output_dir = "output/mask_rcnn_vitdet_h"
