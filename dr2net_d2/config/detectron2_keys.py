"""Detectron2's keys that the torchvision engine honours, with Detectron2's defaults."""

from __future__ import annotations

from dr2net_d2.config.table import (
    Key,
    Section,
    above,
    at_least,
    by_full_name,
    list_of,
    numbers,
    one_of,
)

HONOURED_SECTIONS = (
    Section(
        "",
        {
            "VERSION": Key(2, "Version of the config format.", torchvision=one_of(2)),
            "SEED": Key(-1, "Seed of all random numbers; if negative, one is drawn."),
            "OUTPUT_DIR": Key("./output", "Folder that everything is written to."),
        },
    ),
    Section(
        "MODEL",
        {
            "DEVICE": Key("cuda", "`cpu`, `cuda` or `cuda:<number>`."),
            "WEIGHTS": Key("", "Checkpoint to start from or to evaluate."),
            "PIXEL_MEAN": Key(
                [103.530, 116.280, 123.675],
                "Mean per channel of pixels from 0 to 255, in the order of `INPUT.FORMAT`.",
                torchvision=numbers(3),
            ),
            "PIXEL_STD": Key(
                [1.0, 1.0, 1.0],
                "Standard deviation per channel, likewise.",
                torchvision=numbers(3),
            ),
        },
    ),
    Section(
        "MODEL.BACKBONE",
        {
            "NAME": Key(
                "build_resnet_backbone",
                "Builder of the backbone.",
                torchvision=one_of("build_dr2net_vitdet_backbone"),
            ),
        },
    ),
    Section("MODEL.FPN", {"OUT_CHANNELS": Key(256, "Channels of every level.", at_least(1))}),
    Section(
        "MODEL.ANCHOR_GENERATOR",
        {
            "SIZES": Key(
                [[32, 64, 128, 256, 512]],
                "Roots of the anchors' areas, in pixels; one list for all levels, or one each.",
            ),
            "ASPECT_RATIOS": Key(
                [[0.5, 1.0, 2.0]], "Height over width of the anchors, in lists likewise."
            ),
        },
    ),
    Section(
        "MODEL.RPN",
        {
            "IN_FEATURES": Key(
                ["res4"], "Levels to propose on; torchvision's RPN needs all of the pyramid."
            ),
            "CONV_DIMS": Key(
                [-1],
                "Channels of each convolution of the head; -1 keeps those of the pyramid.",
                torchvision=list_of(one_of(-1), minimum=1),
            ),
            "PRE_NMS_TOPK_TRAIN": Key(
                12000, "Maximum number of proposals per level before NMS, in training."
            ),
            "PRE_NMS_TOPK_TEST": Key(6000, "The same in evaluation."),
            "POST_NMS_TOPK_TRAIN": Key(
                2000, "Maximum number of proposals per image after NMS, in training."
            ),
            "POST_NMS_TOPK_TEST": Key(1000, "The same in evaluation."),
            "NMS_THRESH": Key(0.7, "IoU above which NMS removes the lower-scoring proposal."),
            "BATCH_SIZE_PER_IMAGE": Key(256, "Anchors per image that the loss is computed on."),
            "POSITIVE_FRACTION": Key(0.5, "Maximum fraction of positive ones among them."),
            "IOU_THRESHOLDS": Key(
                [0.3, 0.7],
                "An anchor is negative below the first IoU, and positive from the second on.",
                torchvision=numbers(2),
            ),
        },
    ),
    Section(
        "MODEL.ROI_HEADS",
        {
            "IN_FEATURES": Key(["res4"], "Neighbouring levels to pool from, from fine to coarse."),
            "NUM_CLASSES": Key(80, "Number of categories.", at_least(1)),
            "BATCH_SIZE_PER_IMAGE": Key(512, "Proposals per image that the loss is computed on."),
            "POSITIVE_FRACTION": Key(0.25, "Maximum fraction of positive ones among them."),
            "IOU_THRESHOLDS": Key(
                [0.5], "IoU from which a proposal is positive.", torchvision=numbers(1)
            ),
            "SCORE_THRESH_TEST": Key(0.05, "Minimum score of a detection."),
            "NMS_THRESH_TEST": Key(0.5, "IoU above which NMS removes the lower-scoring detection."),
        },
    ),
    Section(
        "MODEL.ROI_BOX_HEAD",
        {
            "NUM_CONV": Key(0, "Number of convolutions."),
            "CONV_DIM": Key(256, "Their channels."),
            "NORM": Key("", "Their normalisation.", torchvision=one_of("", "LN")),
            "NUM_FC": Key(
                0, "Number of fully connected layers after them.", torchvision=at_least(1)
            ),
            "FC_DIM": Key(1024, "Their width.", at_least(1)),
            "POOLER_RESOLUTION": Key(14, "Side of the pooled maps.", at_least(1)),
            "POOLER_SAMPLING_RATIO": Key(0, "Samples per bin and axis; 0 adapts to the box."),
            "BBOX_REG_WEIGHTS": Key(
                (10.0, 10.0, 5.0, 5.0),
                "Factors on the regression targets (dx, dy, dw, dh).",
                numbers(4),
            ),
        },
    ),
    Section(
        "INPUT",
        {
            "FORMAT": Key(
                "BGR", "Order of the channels of an image.", torchvision=one_of("BGR", "RGB")
            ),
            "RANDOM_FLIP": Key(
                "horizontal",
                "Direction in which every other training image, at random, is flipped.",
                torchvision=one_of("horizontal", "none"),
            ),
            "MIN_SIZE_TRAIN": Key(
                (800,),
                "Shortest sides of a training image, in pixels, such as `(640, 800)`; one is drawn "
                "per image. 0 keeps an image as it is.",
                list_of(at_least(0), minimum=1),
            ),
            "MAX_SIZE_TRAIN": Key(
                1333, "Maximum of a training image's longest side, in pixels.", at_least(1)
            ),
            "MIN_SIZE_TEST": Key(
                800, "Shortest side in evaluation; 0 keeps an image as it is.", at_least(0)
            ),
            "MAX_SIZE_TEST": Key(1333, "Maximum of the longest side in evaluation.", at_least(1)),
        },
    ),
    Section(
        "DATASETS",
        {
            "TRAIN": Key((), "Names of the datasets to train on."),
            "TEST": Key((), "Names of the datasets to evaluate on; torchvision takes one."),
        },
    ),
    Section(
        "DATALOADER",
        {
            "NUM_WORKERS": Key(4, "Processes that load images.", at_least(0)),
            "FILTER_EMPTY_ANNOTATIONS": Key(True, "Train only on images that have objects."),
        },
    ),
    Section(
        "SOLVER",
        {
            "IMS_PER_BATCH": Key(16, "Images per iteration.", at_least(1)),
            "MAX_ITER": Key(40000, "Iterations of the training.", at_least(1)),
            "BASE_LR": Key(0.001, "Learning rate after the warmup.", above(0)),
            "BASE_LR_END": Key(
                0.0, "Learning rate at the end of WarmupCosineLR; at most `BASE_LR`.", at_least(0)
            ),
            "LR_SCHEDULER_NAME": Key(
                "WarmupMultiStepLR",
                "Course of the learning rate.",
                torchvision=one_of("WarmupMultiStepLR", "WarmupCosineLR"),
            ),
            "STEPS": Key(
                (30000,), "Iterations at which WarmupMultiStepLR lowers the learning rate."
            ),
            "GAMMA": Key(0.1, "Factor by which it does so."),
            "WARMUP_FACTOR": Key(0.001, "Factor on the learning rate at the start of the warmup."),
            "WARMUP_ITERS": Key(1000, "Iterations of the warmup.", at_least(0)),
            "WARMUP_METHOD": Key(
                "linear", "Course of the warmup.", torchvision=one_of("linear", "constant")
            ),
            "MOMENTUM": Key(0.9, "Momentum of SGD."),
            "NESTEROV": Key(False, "Use Nesterov's momentum."),
            "WEIGHT_DECAY": Key(0.0001, "Weight decay.", at_least(0)),
            "WEIGHT_DECAY_NORM": Key(
                0.0, "Weight decay of the parameters of normalisation layers.", at_least(0)
            ),
            "CHECKPOINT_PERIOD": Key(5000, "Iterations between two checkpoints.", at_least(1)),
        },
    ),
    Section(
        "SOLVER.CLIP_GRADIENTS",
        {
            "ENABLED": Key(False, "Clip gradients."),
            "CLIP_TYPE": Key(
                "value",
                "What is clipped: every `value`, the `norm` of every parameter's gradient, or that "
                "of the `full_model`.",
            ),
            "CLIP_VALUE": Key(1.0, "Maximum of the value or norm."),
            "NORM_TYPE": Key(2.0, "Order p of the norm."),
        },
    ),
    Section("SOLVER.AMP", {"ENABLED": Key(False, "Train in mixed precision.")}),
    Section(
        "TEST",
        {
            "EVAL_PERIOD": Key(
                0, "Iterations between two evaluations; 0 evaluates at the end only.", at_least(0)
            ),
            "DETECTIONS_PER_IMAGE": Key(100, "Maximum number of detections.", at_least(1)),
        },
    ),
)

HONOURED = by_full_name(HONOURED_SECTIONS)
