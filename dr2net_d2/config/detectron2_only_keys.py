"""Detectron2's keys that the torchvision engine does not read, and the values it accepts for them.

Accepted is what that engine does anyway. A key is left unset unless the config sets it, whatever
Detectron2's default may be.
"""

from __future__ import annotations

from dr2net_d2.config.table import Key, Range, Section, anything, by_full_name, nothing, one_of


def _unread(accepted: Range = anything) -> Key:
    return Key(None, "", torchvision=accepted)


DETECTRON2_ONLY_SECTIONS = (
    Section(
        "",
        {
            "CUDNN_BENCHMARK": _unread(one_of(False)),
            "FLOAT32_PRECISION": _unread(one_of("")),
            "VIS_PERIOD": _unread(one_of(0)),
        },
    ),
    Section(
        "DATALOADER",
        {
            "ASPECT_RATIO_GROUPING": _unread(one_of(False)),
            "SAMPLER_TRAIN": _unread(one_of("TrainingSampler")),
            "REPEAT_THRESHOLD": _unread(),
            "REPEAT_SQRT": _unread(),
        },
    ),
    Section(
        "DATASETS",
        {
            "PROPOSAL_FILES_TRAIN": _unread(),
            "PROPOSAL_FILES_TEST": _unread(),
            "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _unread(),
            "PRECOMPUTED_PROPOSAL_TOPK_TEST": _unread(),
        },
    ),
    Section(
        "GLOBAL",
        {
            "HACK": _unread(),
        },
    ),
    Section(
        "INPUT",
        {
            "MIN_SIZE_TRAIN_SAMPLING": _unread(one_of("choice")),
            "MASK_FORMAT": _unread(),
        },
    ),
    Section(
        "INPUT.CROP",
        {
            "ENABLED": _unread(one_of(False)),
            "TYPE": _unread(),
            "SIZE": _unread(),
        },
    ),
    Section(
        "MODEL",
        {
            "KEYPOINT_ON": _unread(one_of(False)),
            "LOAD_PROPOSALS": _unread(one_of(False)),
            "MASK_ON": _unread(one_of(False)),
            "META_ARCHITECTURE": _unread(one_of("GeneralizedRCNN")),
        },
    ),
    Section(
        "MODEL.ANCHOR_GENERATOR",
        {
            "NAME": _unread(one_of("DefaultAnchorGenerator")),
            "OFFSET": _unread(one_of(0.0)),
            "ANGLES": _unread(),
        },
    ),
    Section(
        "MODEL.BACKBONE",
        {
            "FREEZE_AT": _unread(one_of(0)),
        },
    ),
    Section(
        "MODEL.FPN",
        {
            "NORM": _unread(one_of("LN")),
            "IN_FEATURES": _unread(),
            "FUSE_TYPE": _unread(),
        },
    ),
    Section(
        "MODEL.PANOPTIC_FPN",
        {
            "INSTANCE_LOSS_WEIGHT": _unread(),
        },
    ),
    Section(
        "MODEL.PANOPTIC_FPN.COMBINE",
        {
            "ENABLED": _unread(),
            "OVERLAP_THRESH": _unread(),
            "STUFF_AREA_LIMIT": _unread(),
            "INSTANCES_CONFIDENCE_THRESH": _unread(),
        },
    ),
    Section(
        "MODEL.PROPOSAL_GENERATOR",
        {
            "MIN_SIZE": _unread(one_of(0)),
            "NAME": _unread(one_of("RPN")),
        },
    ),
    Section(
        "MODEL.RESNETS",
        {
            "DEPTH": _unread(),
            "OUT_FEATURES": _unread(),
            "NUM_GROUPS": _unread(),
            "NORM": _unread(),
            "WIDTH_PER_GROUP": _unread(),
            "STRIDE_IN_1X1": _unread(),
            "RES5_DILATION": _unread(),
            "RES2_OUT_CHANNELS": _unread(),
            "STEM_OUT_CHANNELS": _unread(),
            "DEFORM_ON_PER_STAGE": _unread(),
            "DEFORM_MODULATED": _unread(),
            "DEFORM_NUM_GROUPS": _unread(),
        },
    ),
    Section(
        "MODEL.RETINANET",
        {
            "NUM_CLASSES": _unread(),
            "IN_FEATURES": _unread(),
            "NUM_CONVS": _unread(),
            "IOU_THRESHOLDS": _unread(),
            "IOU_LABELS": _unread(),
            "PRIOR_PROB": _unread(),
            "SCORE_THRESH_TEST": _unread(),
            "TOPK_CANDIDATES_TEST": _unread(),
            "NMS_THRESH_TEST": _unread(),
            "BBOX_REG_WEIGHTS": _unread(),
            "FOCAL_LOSS_GAMMA": _unread(),
            "FOCAL_LOSS_ALPHA": _unread(),
            "SMOOTH_L1_LOSS_BETA": _unread(),
            "BBOX_REG_LOSS_TYPE": _unread(),
            "NORM": _unread(),
        },
    ),
    Section(
        "MODEL.ROI_BOX_CASCADE_HEAD",
        {
            "BBOX_REG_WEIGHTS": _unread(),
            "IOUS": _unread(),
        },
    ),
    Section(
        "MODEL.ROI_BOX_HEAD",
        {
            "BBOX_REG_LOSS_TYPE": _unread(one_of("smooth_l1")),
            "BBOX_REG_LOSS_WEIGHT": _unread(one_of(1.0)),
            "CLS_AGNOSTIC_BBOX_REG": _unread(one_of(False)),
            "NAME": _unread(one_of("FastRCNNConvFCHead")),
            "POOLER_TYPE": _unread(one_of("ROIAlignV2")),
            # torchvision's losses turn from L2 to L1 at 1/9.
            "SMOOTH_L1_BETA": _unread(one_of(1 / 9)),
            "TRAIN_ON_PRED_BOXES": _unread(one_of(False)),
            "USE_FED_LOSS": _unread(one_of(False)),
            "USE_SIGMOID_CE": _unread(one_of(False)),
            "FED_LOSS_FREQ_WEIGHT_POWER": _unread(),
            "FED_LOSS_NUM_CLASSES": _unread(),
        },
    ),
    Section(
        "MODEL.ROI_HEADS",
        {
            "IOU_LABELS": _unread(one_of([0, 1])),
            "NAME": _unread(one_of("StandardROIHeads")),
            "PROPOSAL_APPEND_GT": _unread(one_of(True)),
        },
    ),
    Section(
        "MODEL.ROI_KEYPOINT_HEAD",
        {
            "NAME": _unread(),
            "POOLER_RESOLUTION": _unread(),
            "POOLER_SAMPLING_RATIO": _unread(),
            "CONV_DIMS": _unread(),
            "NUM_KEYPOINTS": _unread(),
            "MIN_KEYPOINTS_PER_IMAGE": _unread(),
            "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": _unread(),
            "LOSS_WEIGHT": _unread(),
            "POOLER_TYPE": _unread(),
        },
    ),
    Section(
        "MODEL.ROI_MASK_HEAD",
        {
            "NAME": _unread(),
            "POOLER_RESOLUTION": _unread(),
            "POOLER_SAMPLING_RATIO": _unread(),
            "NUM_CONV": _unread(),
            "CONV_DIM": _unread(),
            "NORM": _unread(),
            "CLS_AGNOSTIC_MASK": _unread(),
            "POOLER_TYPE": _unread(),
        },
    ),
    Section(
        "MODEL.RPN",
        {
            "BBOX_REG_LOSS_TYPE": _unread(one_of("smooth_l1")),
            "BBOX_REG_LOSS_WEIGHT": _unread(one_of(1.0)),
            "BBOX_REG_WEIGHTS": _unread(one_of([1.0, 1.0, 1.0, 1.0])),
            "BOUNDARY_THRESH": _unread(one_of(-1)),
            "HEAD_NAME": _unread(one_of("StandardRPNHead")),
            "IOU_LABELS": _unread(one_of([0, -1, 1])),
            "LOSS_WEIGHT": _unread(one_of(1.0)),
            "SMOOTH_L1_BETA": _unread(one_of(1 / 9)),
        },
    ),
    Section(
        "MODEL.SEM_SEG_HEAD",
        {
            "NAME": _unread(),
            "IN_FEATURES": _unread(),
            "IGNORE_VALUE": _unread(),
            "NUM_CLASSES": _unread(),
            "CONVS_DIM": _unread(),
            "COMMON_STRIDE": _unread(),
            "NORM": _unread(),
            "LOSS_WEIGHT": _unread(),
        },
    ),
    Section(
        "SOLVER",
        {
            "BIAS_LR_FACTOR": _unread(one_of(1.0)),
            "REFERENCE_WORLD_SIZE": _unread(one_of(0)),
            "RESCALE_INTERVAL": _unread(one_of(False)),
            "WEIGHT_DECAY_BIAS": _unread(nothing),
            "NUM_DECAYS": _unread(),
        },
    ),
    Section(
        "TEST",
        {
            "EXPECTED_RESULTS": _unread(one_of([])),
            "KEYPOINT_OKS_SIGMAS": _unread(),
        },
    ),
    Section(
        "TEST.AUG",
        {
            "ENABLED": _unread(one_of(False)),
            "MIN_SIZES": _unread(),
            "MAX_SIZE": _unread(),
            "FLIP": _unread(),
        },
    ),
    Section(
        "TEST.PRECISE_BN",
        {
            "ENABLED": _unread(one_of(False)),
            "NUM_ITER": _unread(),
        },
    ),
)

DETECTRON2_ONLY = by_full_name(DETECTRON2_ONLY_SECTIONS)
