from ..common.coco_lsj import boxes_alone, dataloader
from ..common.mask_rcnn_vitdet import dr2net, model
from ..common.recipe import lr_multiplier, optimizer, train

boxes_alone(dataloader)
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[name]
train.output_dir = "output/faster_rcnn_vitdet_b"
