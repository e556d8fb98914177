"""Our keys of SOLVER, INPUT and TEST: what training recipes and evaluations need."""

from __future__ import annotations

from dr2net_d2.config.table import (
    Key,
    Section,
    above,
    at_least,
    at_most,
    below,
    between,
    one_of,
)
from dr2net_d2.evaluation import PROTOCOLS

_TILE_SIZE = Key(640, "Side of a tile, in pixels of the image.", at_least(1))
_TILE_OVERLAP = Key(
    0.25, "Overlap of neighbouring tiles, as a fraction of their side.", at_least(0) & below(1)
)

RECIPE_SECTIONS = (
    Section(
        "SOLVER",
        {
            "OPTIMIZER": Key("SGD", "The optimizer.", one_of("SGD", "AdamW")),
            "LAYER_DECAY": Key(
                1.0,
                "Factor on the learning rate per ViT layer, counted down from the head; 1 turns it "
                "off.",
            ),
            "WEIGHT_DECAY_OVERRIDES": Key(
                [["*pos_embed", 0.0], ["*relative_position_bias_table", 0.0]],
                "Pairs of a pattern for names of parameters and their weight decay; the last "
                "pattern that matches counts.",
            ),
            "ACCUMULATION_STEPS": Key(
                1,
                "Number of groups into which the `IMS_PER_BATCH` images of an iteration are split, "
                "to go through the network one after the other.",
                at_least(1),
                torchvision=one_of(1),
            ),
            "EMA_DECAY": Key(
                0.0,
                "Decay of a moving average of the weights, which is evaluated and saved in place "
                "of the weights; 0 keeps no average.",
                at_least(0) & below(1),
                torchvision=one_of(0.0),
            ),
            "FSDP": Key(
                False,
                "Shard parameters, gradients and optimizer state over the processes (FSDP2) "
                "instead of keeping all of them on each; for ViT-H and larger. Neither checkpoints "
                "nor training in a single process change.",
                torchvision=one_of(False),
            ),
            "FP16_COMPRESSION": Key(False, "Send gradients between GPUs in half precision."),
        },
    ),
    Section(
        "SOLVER.AMP",
        {
            "DTYPE": Key(
                "float16",
                "Precision of autocast; `float16` comes with loss scaling.",
                one_of("float16", "bfloat16"),
            ),
        },
    ),
    Section(
        "INPUT",
        {
            "FILL_IGNORED": Key(
                False,
                "In training, paint crowd boxes (`iscrowd` 1) and ignored regions over with "
                "`MODEL.PIXEL_MEAN` where no object lies, so that what is unlabelled there is not "
                "learned as background.",
            ),
        },
    ),
    Section(
        "INPUT.LSJ",
        {
            "ENABLED": Key(False, "Use it, in place of `INPUT.MIN_SIZE_TRAIN`."),
            "IMAGE_SIZE": Key(
                1024,
                "Side of the square, in pixels, that a rescaled image is cropped to.",
                at_least(1),
            ),
            "MIN_SCALE": Key(
                0.1, "Smallest scale; scale 1 fits the image into the square.", above(0)
            ),
            "MAX_SCALE": Key(2.0, "Largest scale.", above(0)),
        },
        "Large-scale jittering ([arXiv 2012.07177](https://arxiv.org/abs/2012.07177)): flip, "
        "rescale, crop.",
    ),
    Section(
        "INPUT.TILES",
        {
            "ENABLED": Key(False, "Train on tiles."),
            "SIZE": _TILE_SIZE,
            "OVERLAP": _TILE_OVERLAP,
            "MIN_VISIBLE": Key(
                0.4,
                "Fraction of an object's area that a tile must contain to show the object. An "
                "object with less is painted over with `MODEL.PIXEL_MEAN`, so that it is neither "
                "object nor background.",
                between(0, 1),
            ),
            "EMPTY_RATIO": Key(
                0.1,
                "Maximum number of tiles without an object per tile with one; they are drawn once.",
                at_least(0),
            ),
        },
        "Training on overlapping tiles of the images, which the other keys of `INPUT` then resize, "
        "flip and crop.",
    ),
    Section(
        "TEST",
        {
            "BEST_CHECKPOINT": Key(
                "",
                'Metric, such as "bbox/AP", whose best weights are kept in `model_best.pth`; the '
                "empty string keeps none.",
                torchvision=one_of(""),
            ),
            "PROTOCOL": Key(
                "coco",
                "How boxes are counted: as COCO or another benchmark does; see "
                "[Evaluate small objects](evaluation.md). `coco` counts up to "
                "`TEST.DETECTIONS_PER_IMAGE` detections; the others have maxima of their own, "
                "which that key should reach.",
                one_of(*PROTOCOLS),
            ),
        },
    ),
    Section(
        "TEST.TILES",
        {
            "ENABLED": Key(False, "Detect in tiles."),
            "SIZE": _TILE_SIZE,
            "OVERLAP": _TILE_OVERLAP,
            "WHOLE_IMAGE": Key(
                True, "Detect in the whole image as well, for objects larger than a tile."
            ),
            "MERGE_THRESH": Key(
                0.5,
                "IoU from which two boxes of the same class are taken for one object.",
                above(0) & at_most(1),
            ),
            "BATCH_SIZE": Key(4, "Tiles that go through the detector together.", at_least(1)),
        },
        "Sliced inference: detection in overlapping tiles, each resized as `INPUT.MIN_SIZE_TEST` "
        "says.",
    ),
)
