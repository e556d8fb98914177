from ..common.coco_lsj import dataloader
from ..common.lvis import use_lvis
from ..common.mask_rcnn_vitdet import dr2net, model
from ..common.recipe import lr_multiplier, optimizer, train

use_lvis(dataloader, model, train, optimizer, lr_multiplier)
train.output_dir = "output/lvis_mask_rcnn_vitdet_b"
