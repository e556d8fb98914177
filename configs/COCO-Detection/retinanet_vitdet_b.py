from ..common.coco_lsj import boxes_alone, dataloader
from ..common.dense_vitdet import dense_detector
from ..common.mask_rcnn_vitdet import dr2net
from ..common.recipe import lr_multiplier, optimizer, train

boxes_alone(dataloader)
model = dense_detector("retinanet")
train.output_dir = "output/retinanet_vitdet_b"
