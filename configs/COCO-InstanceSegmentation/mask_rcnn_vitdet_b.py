from ..common.coco_lsj import dataloader
from ..common.mask_rcnn_vitdet import dr2net, model
from ..common.recipe import lr_multiplier, optimizer, train

train.output_dir = "output/mask_rcnn_vitdet_b"
