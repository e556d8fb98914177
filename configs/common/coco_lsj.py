"""COCO with large-scale jittering at 1024 px, as in Detectron2's projects/ViTDet."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from dr2net_d2.d2.data import CheckedMapper
from dr2net_d2.d2.zoo import zoo_config

image_size = 1024

dataloader = zoo_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 64
dataloader.train.mapper.update(
    _target_=CheckedMapper,
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeScale)(
            min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size
        ),
        L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
    ],
    image_format="RGB",
    # A crop moves the edges of the objects that it cuts.
    recompute_boxes=True,
)
dataloader.test.mapper.update(
    _target_=CheckedMapper,
    augmentations=[L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)],
)
dataloader.evaluator.output_dir = "${...train.output_dir}/inference"


def boxes_alone(dataloader):
    """For a detector without masks, in place."""
    dataloader.train.mapper.update(use_instance_mask=False, recompute_boxes=False)
