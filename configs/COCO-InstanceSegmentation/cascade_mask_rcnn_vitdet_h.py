from ..common.cascade import use_cascade
from .mask_rcnn_vitdet_h import dataloader, dr2net, lr_multiplier, model, optimizer, train

use_cascade(model)
train.output_dir = "output/cascade_mask_rcnn_vitdet_h"
