"""Config of the torchvision engine: which of Detectron2's keys it honours, and which it refuses."""

from __future__ import annotations

import logging
from typing import Any

from fvcore.common.config import CfgNode

from dr2net_d2.config import (
    add_dr2net_config,
    build_slicing,
    check_jittering,
    training_tiles,
    value_of,
)
from dr2net_d2.errors import ConfigError
from dr2net_d2.evaluation import choose_protocol

logger = logging.getLogger(__name__)

HONOURED: dict[str, Any] = {
    "VERSION": 2,
    "MODEL": {
        "DEVICE": "cuda",
        "WEIGHTS": "",
        # In the channel order of INPUT.FORMAT, for pixels from 0 to 255.
        "PIXEL_MEAN": [103.530, 116.280, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"NAME": "build_resnet_backbone"},
        "FPN": {"OUT_CHANNELS": 256},
        "ANCHOR_GENERATOR": {
            "SIZES": [[32, 64, 128, 256, 512]],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "RPN": {
            "IN_FEATURES": ["res4"],
            "CONV_DIMS": [-1],
            "PRE_NMS_TOPK_TRAIN": 12000,
            "PRE_NMS_TOPK_TEST": 6000,
            "POST_NMS_TOPK_TRAIN": 2000,
            "POST_NMS_TOPK_TEST": 1000,
            "NMS_THRESH": 0.7,
            "BATCH_SIZE_PER_IMAGE": 256,
            "POSITIVE_FRACTION": 0.5,
            "IOU_THRESHOLDS": [0.3, 0.7],
        },
        "ROI_HEADS": {
            "IN_FEATURES": ["res4"],
            "NUM_CLASSES": 80,
            "BATCH_SIZE_PER_IMAGE": 512,
            "POSITIVE_FRACTION": 0.25,
            "IOU_THRESHOLDS": [0.5],
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
        },
        "ROI_BOX_HEAD": {
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
            "NUM_FC": 0,
            "FC_DIM": 1024,
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        },
    },
    "INPUT": {
        "FORMAT": "BGR",
        "RANDOM_FLIP": "horizontal",
        "MIN_SIZE_TRAIN": (800,),
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
    },
    "DATASETS": {"TRAIN": (), "TEST": ()},
    "DATALOADER": {"NUM_WORKERS": 4, "FILTER_EMPTY_ANNOTATIONS": True},
    "SOLVER": {
        "IMS_PER_BATCH": 16,
        "MAX_ITER": 40000,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "STEPS": (30000,),
        "GAMMA": 0.1,
        "WARMUP_FACTOR": 0.001,
        "WARMUP_ITERS": 1000,
        "WARMUP_METHOD": "linear",
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "CLIP_GRADIENTS": {
            "ENABLED": False,
            "CLIP_TYPE": "value",
            "CLIP_VALUE": 1.0,
            "NORM_TYPE": 2.0,
        },
        "AMP": {"ENABLED": False},
        "CHECKPOINT_PERIOD": 5000,
    },
    "TEST": {"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 100},
    "SEED": -1,
    "OUTPUT_DIR": "./output",
}
"""Keys of Detectron2 that mean the same here, with Detectron2's defaults."""

_ANY = None

DETECTRON2_ONLY: dict[str, tuple[Any, ...] | None] = {
    # What this engine does anyway; another value asks for what it does not have.
    "CUDNN_BENCHMARK": (False,),
    "DATALOADER.ASPECT_RATIO_GROUPING": (False,),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "FLOAT32_PRECISION": ("",),
    "INPUT.CROP.ENABLED": (False,),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0.0,),
    "MODEL.BACKBONE.FREEZE_AT": (0,),
    "MODEL.FPN.NORM": ("LN",),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.MASK_ON": (False,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (0,),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": (1.0,),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (False,),
    "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2",),
    # torchvision's losses turn from L2 to L1 at 1/9.
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (1 / 9,),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_HEADS.IOU_LABELS": ([0, 1],),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads",),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": (True,),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": (1.0,),
    "MODEL.RPN.BBOX_REG_WEIGHTS": ([1.0, 1.0, 1.0, 1.0],),
    "MODEL.RPN.BOUNDARY_THRESH": (-1,),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.IOU_LABELS": ([0, -1, 1],),
    "MODEL.RPN.LOSS_WEIGHT": (1.0,),
    "MODEL.RPN.SMOOTH_L1_BETA": (1 / 9,),
    "SOLVER.BIAS_LR_FACTOR": (1.0,),
    "SOLVER.REFERENCE_WORLD_SIZE": (0,),
    "SOLVER.RESCALE_INTERVAL": (False,),
    "SOLVER.WEIGHT_DECAY_BIAS": (),
    "TEST.AUG.ENABLED": (False,),
    "TEST.EXPECTED_RESULTS": ([],),
    "TEST.PRECISE_BN.ENABLED": (False,),
    "VIS_PERIOD": (0,),
    # Without effect as long as the keys above have their accepted values.
    **{
        f"{section}.{name}": _ANY
        for section, names in {
            "DATALOADER": "REPEAT_THRESHOLD REPEAT_SQRT",
            "DATASETS": "PROPOSAL_FILES_TRAIN PROPOSAL_FILES_TEST PRECOMPUTED_PROPOSAL_TOPK_TRAIN "
            "PRECOMPUTED_PROPOSAL_TOPK_TEST",
            "GLOBAL": "HACK",
            "INPUT": "MASK_FORMAT",
            "INPUT.CROP": "TYPE SIZE",
            "MODEL.ANCHOR_GENERATOR": "ANGLES",
            "MODEL.FPN": "IN_FEATURES FUSE_TYPE",
            "MODEL.PANOPTIC_FPN": "INSTANCE_LOSS_WEIGHT",
            "MODEL.PANOPTIC_FPN.COMBINE": "ENABLED OVERLAP_THRESH STUFF_AREA_LIMIT "
            "INSTANCES_CONFIDENCE_THRESH",
            "MODEL.RESNETS": "DEPTH OUT_FEATURES NUM_GROUPS NORM WIDTH_PER_GROUP STRIDE_IN_1X1 "
            "RES5_DILATION RES2_OUT_CHANNELS STEM_OUT_CHANNELS DEFORM_ON_PER_STAGE "
            "DEFORM_MODULATED DEFORM_NUM_GROUPS",
            "MODEL.RETINANET": "NUM_CLASSES IN_FEATURES NUM_CONVS IOU_THRESHOLDS IOU_LABELS "
            "PRIOR_PROB SCORE_THRESH_TEST TOPK_CANDIDATES_TEST NMS_THRESH_TEST BBOX_REG_WEIGHTS "
            "FOCAL_LOSS_GAMMA FOCAL_LOSS_ALPHA SMOOTH_L1_LOSS_BETA BBOX_REG_LOSS_TYPE NORM",
            "MODEL.ROI_BOX_CASCADE_HEAD": "BBOX_REG_WEIGHTS IOUS",
            "MODEL.ROI_BOX_HEAD": "FED_LOSS_FREQ_WEIGHT_POWER FED_LOSS_NUM_CLASSES",
            "MODEL.ROI_KEYPOINT_HEAD": "NAME POOLER_RESOLUTION POOLER_SAMPLING_RATIO CONV_DIMS "
            "NUM_KEYPOINTS MIN_KEYPOINTS_PER_IMAGE NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS "
            "LOSS_WEIGHT POOLER_TYPE",
            "MODEL.ROI_MASK_HEAD": "NAME POOLER_RESOLUTION POOLER_SAMPLING_RATIO NUM_CONV "
            "CONV_DIM NORM CLS_AGNOSTIC_MASK POOLER_TYPE",
            "MODEL.SEM_SEG_HEAD": "NAME IN_FEATURES IGNORE_VALUE NUM_CLASSES CONVS_DIM "
            "COMMON_STRIDE NORM LOSS_WEIGHT",
            "SOLVER": "NUM_DECAYS",
            "TEST": "KEYPOINT_OKS_SIGMAS",
            "TEST.AUG": "MIN_SIZES MAX_SIZE FLIP",
            "TEST.PRECISE_BN": "NUM_ITER",
        }.items()
        for name in names.split()
    },
}
"""Keys of Detectron2 that mean nothing here, and the values that may be given; None is any value.

Left alone they are not set, whatever Detectron2's default is; given with another value they are
refused.
"""

_CHOICES = {
    "VERSION": (2,),
    "MODEL.BACKBONE.NAME": ("build_dr2net_vitdet_backbone",),
    "MODEL.ROI_BOX_HEAD.NORM": ("", "LN"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.RANDOM_FLIP": ("horizontal", "none"),
    "MODEL.VIT.TOP_BLOCK": ("LastLevelMaxPool",),
    "SOLVER.ACCUMULATION_STEPS": (1,),
    "SOLVER.EMA_DECAY": (0.0,),
    "SOLVER.FSDP": (False,),
    "TEST.BEST_CHECKPOINT": ("",),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}

_MINIMA = {
    "MODEL.FPN.OUT_CHANNELS": 1,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 1,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TEST": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.WEIGHT_DECAY_NORM": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
}

_LENGTHS = {
    "MODEL.PIXEL_MEAN": 3,
    "MODEL.PIXEL_STD": 3,
    "MODEL.RPN.IOU_THRESHOLDS": 2,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": 1,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": 4,
}


def get_cfg() -> CfgNode:
    """The default config: ``HONOURED``, this project's own keys, ``DETECTRON2_ONLY`` as None."""
    cfg = CfgNode(HONOURED)
    add_dr2net_config(cfg)
    for key in DETECTRON2_ONLY:
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = None
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Refuse what this engine cannot do; leave only honoured keys in ``cfg``.

    Raises:
        ConfigError: names the key, its value, what is allowed and what to do.
    """
    for key, accepted in DETECTRON2_ONLY.items():
        value = _take(cfg, key)
        if value is None:
            continue
        if accepted is not None and _as_list(value) not in map(_as_list, accepted):
            _refuse(key, value, accepted)
        logger.info("%s is ignored: it is for Detectron2", key)
    for key, choices in _CHOICES.items():
        if (value := value_of(cfg, key)) not in choices:
            _refuse(key, value, choices)
    for key, minimum in _MINIMA.items():
        if (value := value_of(cfg, key)) < minimum:
            raise ConfigError(f"{key} is {value}; it must be at least {minimum}")
    for key, length in _LENGTHS.items():
        if len(value := value_of(cfg, key)) != length:
            raise ConfigError(f"{key} is {value!r}; it must have {length} numbers")
    if not cfg.MODEL.RPN.CONV_DIMS or set(cfg.MODEL.RPN.CONV_DIMS) != {-1}:
        raise ConfigError(
            f"MODEL.RPN.CONV_DIMS is {cfg.MODEL.RPN.CONV_DIMS}; torchvision's RPN keeps the width "
            "of the pyramid: write one -1 per convolution"
        )
    if not cfg.INPUT.MIN_SIZE_TRAIN or min(cfg.INPUT.MIN_SIZE_TRAIN) < 0:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}; list shortest sides in px, "
            "such as (640, 800); 0 keeps an image as it is"
        )
    if cfg.SOLVER.BASE_LR <= 0 or not 0 <= cfg.SOLVER.BASE_LR_END <= cfg.SOLVER.BASE_LR:
        raise ConfigError(
            f"SOLVER.BASE_LR is {cfg.SOLVER.BASE_LR} and BASE_LR_END {cfg.SOLVER.BASE_LR_END}; "
            "they need 0 <= BASE_LR_END <= BASE_LR and BASE_LR > 0"
        )
    choose_protocol(cfg.TEST.PROTOCOL, cfg.TEST.DETECTIONS_PER_IMAGE)
    if cfg.INPUT.LSJ.ENABLED:
        check_jittering(cfg.INPUT.LSJ)
    training_tiles(cfg)
    build_slicing(cfg)
    _check_square(cfg)


def _check_square(cfg: CfgNode) -> None:
    side = cfg.MODEL.VIT.SQUARE_PAD
    for split in ("TRAIN", "TEST"):
        longest = cfg.INPUT[f"MAX_SIZE_{split}"]
        if side and longest > side:
            raise ConfigError(
                f"INPUT.MAX_SIZE_{split} is {longest} px, MODEL.VIT.SQUARE_PAD only {side} px; "
                "lower it, or pad to a larger square (0: only as far as the strides need)"
            )


def _refuse(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    here = " or ".join(map(repr, allowed)) or "nothing: remove the key"
    raise ConfigError(
        f"{key} is {value!r}; the torchvision engine takes {here}. For other values install "
        "Detectron2 and pass --engine detectron2"
    )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _take(cfg: CfgNode, key: str) -> Any:
    """Remove a key, with the sections that it leaves empty; returns its value."""
    name, _, rest = key.partition(".")
    if not rest:
        return cfg.pop(name)
    value = _take(cfg[name], rest)
    if not cfg[name]:
        del cfg[name]
    return value
