"""Our keys of MODEL: the backbones, what makes them reversible, and FCOS."""

from __future__ import annotations

from dr2net_d2.config.table import (
    Key,
    Range,
    Section,
    above,
    at_least,
    between,
    list_of,
    one_of,
)
from dr2net_d2.core.schedule import SCHEDULES

LEAN_PARTS = ("pyramid", "rpn", "roi")

_SQUARE_PAD = Key(
    0,
    "Pad both sides of every image to a multiple of this many pixels; 0 pads only as far as the "
    "coarsest stride needs.",
    at_least(0),
)
_DROP_PATH_RATE = "Stochastic depth rate of the last block; it grows linearly from 0 at the first."
_MLP_RATIO = Key(4.0, "Width of the MLP's hidden layer, as a multiple of the block's width.")
_QKV_BIAS = Key(True, "Give the projections to queries, keys and values a bias.")
_PRETRAIN_IMG_SIZE = Key(
    224, "Side of the pretraining images, in pixels; sizes the absolute position table."
)
_PRETRAIN_USE_CLS_TOKEN = Key(True, "The pretrained position table has an entry for a class token.")
_USE_ABS_POS = "Add absolute position embeddings to the tokens."
_USE_REL_POS = Key(True, "Add relative position embeddings to the attention scores.")

VIT = Section(
    "MODEL.VIT",
    {
        "IMG_SIZE": Key(
            1024,
            "Side of the images, in pixels, that the relative position tables of global attention "
            "are sized for.",
        ),
        "PATCH_SIZE": Key(16, "Side of a patch, in pixels.", at_least(1)),
        "EMBED_DIM": Key(768, "Width of the tokens.", at_least(1)),
        "DEPTH": Key(12, "Number of blocks."),
        "NUM_HEADS": Key(12, "Attention heads per block.", at_least(1)),
        "MLP_RATIO": _MLP_RATIO,
        "QKV_BIAS": _QKV_BIAS,
        "DROP_PATH_RATE": Key(0.1, _DROP_PATH_RATE),
        "USE_ABS_POS": Key(True, _USE_ABS_POS),
        "USE_REL_POS": _USE_REL_POS,
        "WINDOW_SIZE": Key(14, "Side of an attention window, in tokens."),
        "WINDOW_BLOCK_INDEXES": Key(
            [0, 1, 3, 4, 6, 7, 9, 10],
            "Blocks that attend within windows; the others attend globally.",
        ),
        "PRETRAIN_IMG_SIZE": _PRETRAIN_IMG_SIZE,
        "PRETRAIN_USE_CLS_TOKEN": _PRETRAIN_USE_CLS_TOKEN,
        "SCALE_FACTORS": Key(
            [4.0, 2.0, 1.0, 0.5],
            "Levels of the pyramid: each has stride `PATCH_SIZE` / scale and "
            "`MODEL.FPN.OUT_CHANNELS` channels.",
            list_of(one_of(8.0, 4.0, 2.0, 1.0, 0.5), minimum=1),
        ),
        "TOP_BLOCK": Key(
            "LastLevelMaxPool",
            "Coarser levels on top of those: one by `LastLevelMaxPool`, two by `LastLevelP6P7`, "
            "none by the empty string.",
            one_of("LastLevelMaxPool", "LastLevelP6P7", ""),
            torchvision=one_of("LastLevelMaxPool"),
        ),
        "SQUARE_PAD": _SQUARE_PAD,
    },
    "The plain ViT, by default ViTDet-B. Both the stock and the Dr2Net backbones read these keys.",
)

SWIN = Section(
    "MODEL.SWIN",
    {
        "EMBED_DIM": Key(96, "Width of the first stage; it doubles with every further one."),
        "DEPTHS": Key([2, 2, 6, 2], "Blocks of each stage."),
        "NUM_HEADS": Key([3, 6, 12, 24], "Attention heads of each stage."),
        "WINDOW_SIZE": Key(7, "Side of an attention window, in tokens."),
        "MLP_RATIO": _MLP_RATIO,
        "QKV_BIAS": _QKV_BIAS,
        "DROP_PATH_RATE": Key(0.2, _DROP_PATH_RATE),
        "APE": Key(False, _USE_ABS_POS),
        "PRETRAIN_IMG_SIZE": _PRETRAIN_IMG_SIZE,
        "PATCH_NORM": Key(True, "Apply a LayerNorm after the patch embedding."),
        "FROZEN_STAGES": Key(
            -1,
            "Layers that keep their pretrained weights: -1 none, 0 the patch embedding, n > 1 also "
            "the first n - 1 stages.",
        ),
        "SQUARE_PAD": _SQUARE_PAD,
    },
    "Swin, by default Swin-T, for Detectron2. Both the stock and the Dr2Net backbones read these "
    "keys.",
)

MVIT = Section(
    "MODEL.MVIT",
    {
        "IMG_SIZE": Key(
            224,
            "Side of the images, in pixels, that the relative position tables are sized for; at "
            "other sizes they are interpolated.",
        ),
        "EMBED_DIM": Key(96, "Width of the first stage; it doubles with every further one."),
        "NUM_HEADS": Key(
            1, "Attention heads of the first stage; they double with every further one."
        ),
        "DEPTH": Key(10, "Number of blocks."),
        "LAST_BLOCK_INDEXES": Key([0, 2, 7, 9], "The last block of each of the four stages."),
        "ADAPTIVE_KV_STRIDE": Key(
            4,
            "Stride of the pooled keys and values in the first stage; it halves with every further "
            "one.",
        ),
        "ADAPTIVE_WINDOW_SIZE": Key(
            56,
            "Side of an attention window in the first stage, in tokens; it halves with every "
            "further one.",
        ),
        "RESIDUAL_POOLING": Key(True, "Add the pooled queries to the output of attention."),
        "MLP_RATIO": _MLP_RATIO,
        "QKV_BIAS": _QKV_BIAS,
        "DROP_PATH_RATE": Key(0.1, _DROP_PATH_RATE),
        "USE_ABS_POS": Key(False, _USE_ABS_POS),
        "USE_REL_POS": _USE_REL_POS,
        "PRETRAIN_IMG_SIZE": _PRETRAIN_IMG_SIZE,
        "PRETRAIN_USE_CLS_TOKEN": _PRETRAIN_USE_CLS_TOKEN,
        "SQUARE_PAD": _SQUARE_PAD,
    },
    "MViTv2, by default MViTv2-T, for Detectron2. Both the stock and the Dr2Net backbones read "
    "these keys.",
)

DR2NET = Section(
    "MODEL.DR2NET",
    {
        "REVERSIBLE": Key(
            True,
            "Recompute activations in the backward; `False` stores them as an ordinary network "
            "does, with the same arithmetic.",
        ),
        "ARITHMETIC": Key(
            "exact",
            "`exact` keeps the streams in fixed point and inverts them bit for bit; `float` "
            "inverts in floating point, as in the literature.",
            one_of("exact", "float"),
        ),
        "FIRST_STATE": Key(
            "copy",
            "The state before the first step: a copy of the first state, or zero.",
            one_of("copy", "zero"),
        ),
        "OUTPUT": Key(
            "last",
            "What the backbone returns: the last stream, or the mean of the last two.",
            one_of("last", "mean"),
        ),
        "LEAN": Key(
            list(LEAN_PARTS),
            "Modules around the backbone that store little for their backward, exactly; `roi` "
            "means the heads. An empty list leaves all of them as they are.",
            list_of(one_of(*LEAN_PARTS)),
        ),
        "ALLOW_PARTIAL": Key(
            [],
            "Patterns for keys of a checkpoint or of the model that may be unexpected, missing or "
            "of another shape. The error that refuses such keys names them.",
        ),
    },
    "The reversible network.",
)

SCHEDULE = Section(
    "MODEL.DR2NET.SCHEDULE",
    {
        "KIND": Key(
            "convex",
            "Path of alpha and beta. The name of a function or a class of your own is imported, so "
            "only use such a config from people you trust.",
            Range(
                f"{one_of(*SCHEDULES).text}, or 'package.module.Name' of your own",
                lambda value: value in SCHEDULES or "." in value,
            ),
        ),
        "START_BETA": Key(1 / 16, "Beta at the start of the training.", between(0, 1)),
        "END_BETA": Key(0.5, "Beta from the end of `DURATION` on.", between(0, 1)),
        "DURATION": Key(
            0.5, "When the final coefficients are reached; from then on they hold.", above(0)
        ),
        "UNIT": Key(
            "fraction",
            "Unit of `DURATION`: a fraction of the training, iterations or epochs.",
            one_of("fraction", "iterations", "epochs"),
        ),
        "UPDATES": Key(
            0, "Number of stages within `DURATION`; 0 moves every iteration.", at_least(0)
        ),
    },
    "How alpha and beta move during training; see [Choose a schedule](schedule.md).",
)

FCOS = Section(
    "MODEL.FCOS",
    {
        "NUM_CLASSES": Key(80, "Number of categories."),
        "IN_FEATURES": Key(["p3", "p4", "p5", "p6", "p7"], "Levels of the pyramid to detect on."),
        "NUM_CONVS": Key(4, "Convolutions of each of the two towers."),
        "NORM": Key("GN", "Normalisation in the towers."),
        "PRIOR_PROB": Key(0.01, "Class probability that the head starts training from."),
        "CENTER_SAMPLING_RADIUS": Key(
            1.5,
            "Distance from the centre of an object, in strides, within which locations learn it.",
        ),
        "FOCAL_LOSS_ALPHA": Key(0.25, "Alpha of the focal loss."),
        "FOCAL_LOSS_GAMMA": Key(2.0, "Gamma of the focal loss."),
        "SCORE_THRESH_TEST": Key(
            0.2, "Minimum score of a detection, the root of class score times centerness."
        ),
        "TOPK_CANDIDATES_TEST": Key(1000, "Maximum number of detections per level before NMS."),
        "NMS_THRESH_TEST": Key(0.6, "IoU above which NMS removes the lower-scoring box."),
    },
    'Read by Detectron2 if `MODEL.META_ARCHITECTURE` is "FCOS"; named as in `MODEL.RETINANET`.',
)

MODEL_SECTIONS = (VIT, SWIN, MVIT, DR2NET, SCHEDULE, FCOS)
