"""The keys that this project adds to a config, each with what it means.

Works on any fvcore ``CfgNode``; Detectron2's is one.
"""

from __future__ import annotations

from fvcore.common.config import CfgNode

LEAN_PARTS = ("pyramid", "rpn", "roi")


def add_dr2net_config(cfg: CfgNode) -> None:
    """Add the keys of this project to a config: MODEL.VIT, MODEL.DR2NET and what recipes need."""
    node = type(cfg)

    # The plain ViT; the defaults are ViTDet-B. Both stock and Dr2Net backbones read these.
    cfg.MODEL.VIT = vit = node()
    # Side in px that relative position tables of global attention are sized for.
    vit.IMG_SIZE = 1024
    vit.PATCH_SIZE = 16
    vit.EMBED_DIM = 768
    vit.DEPTH = 12
    vit.NUM_HEADS = 12
    vit.MLP_RATIO = 4.0
    vit.QKV_BIAS = True
    # Stochastic depth rate of the last block; it grows linearly from 0 at the first.
    vit.DROP_PATH_RATE = 0.1
    vit.USE_ABS_POS = True
    vit.USE_REL_POS = True
    # Window side in tokens, and the blocks that attend within windows; the others are global.
    vit.WINDOW_SIZE = 14
    vit.WINDOW_BLOCK_INDEXES = [0, 1, 3, 4, 6, 7, 9, 10]
    # Side in px of the pretraining images, which sizes the absolute position table.
    vit.PRETRAIN_IMG_SIZE = 224
    vit.PRETRAIN_USE_CLS_TOKEN = True
    # Pyramid levels, of 8, 4, 2, 1, 0.5: stride = PATCH_SIZE / scale. Their width is
    # MODEL.FPN.OUT_CHANNELS.
    vit.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]
    # Coarser levels after those: "LastLevelMaxPool" (one), "LastLevelP6P7" (two) or "" (none).
    vit.TOP_BLOCK = "LastLevelMaxPool"
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    vit.SQUARE_PAD = 0

    _add_swin(cfg.MODEL)
    _add_mvit(cfg.MODEL)

    cfg.MODEL.DR2NET = dr2net = node()
    # False stores activations as an ordinary network does, with the same arithmetic.
    dr2net.REVERSIBLE = True
    # "exact" (fixed-point streams, inverted bit for bit) or "float" (the literature's way).
    dr2net.ARITHMETIC = "exact"
    # The state before the first step: "copy" of the first, or "zero".
    dr2net.FIRST_STATE = "copy"
    # What the backbone returns: the "last" stream or the "mean" of the last two.
    dr2net.OUTPUT = "last"
    # Parts around the backbone that keep little for their backward, exactly: "pyramid", "rpn",
    # "roi" (the heads). [] leaves all as they are elsewhere.
    dr2net.LEAN = list(LEAN_PARTS)
    # Patterns of keys of a checkpoint or of the model that may be superfluous, missing, or of
    # another shape, as the error that refuses them names them.
    dr2net.ALLOW_PARTIAL = []
    # How alpha and beta move during training; see core.CoefficientSchedule.
    dr2net.SCHEDULE = node()
    dr2net.SCHEDULE.KIND = "convex"
    dr2net.SCHEDULE.START_BETA = 1 / 16
    dr2net.SCHEDULE.END_BETA = 0.5
    # When the final coefficients are reached, from when on they hold.
    dr2net.SCHEDULE.DURATION = 0.5
    # Of DURATION: "fraction" of the training, "iterations" or "epochs".
    dr2net.SCHEDULE.UNIT = "fraction"
    # Number of stages within it; 0 moves every iteration.
    dr2net.SCHEDULE.UPDATES = 0

    # Of META_ARCHITECTURE "FCOS"; as those of MODEL.RETINANET.
    cfg.MODEL.FCOS = fcos = node()
    fcos.NUM_CLASSES = 80
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.NUM_CONVS = 4
    fcos.NORM = "GN"
    fcos.PRIOR_PROB = 0.01
    # In strides around the centre of an object: the locations that learn it.
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    # Of sqrt(class score * centerness).
    fcos.SCORE_THRESH_TEST = 0.2
    fcos.TOPK_CANDIDATES_TEST = 1000
    fcos.NMS_THRESH_TEST = 0.6

    _add_recipe_config(cfg)
    _add_evaluation(cfg)
    _add_tiles(cfg)


def _add_recipe_config(cfg: CfgNode) -> None:
    node = type(cfg)

    # "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning-rate factor per ViT layer, counted down from the head; 1 turns it off.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Pairs [pattern, weight decay] for names of parameters; the last that fits counts.
    cfg.SOLVER.WEIGHT_DECAY_OVERRIDES = [
        ["*pos_embed", 0.0],
        ["*relative_position_bias_table", 0.0],
    ]
    # Parts that the IMS_PER_BATCH images of an iteration go through the network in.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Of the moving average of the weights, which is evaluated and kept in place of them; 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Shard parameters, gradients and the optimizer's state over the processes (FSDP2) instead of
    # keeping all of them on each; for ViT-H and larger. Checkpoints stay the same, and so does a
    # training in one process.
    cfg.SOLVER.FSDP = False
    # Send gradients between GPUs in half precision.
    cfg.SOLVER.FP16_COMPRESSION = False
    # "float16", with loss scaling, or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"

    # Large-scale jittering (arXiv 2012.07177): flip, rescale, crop. Replaces INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.LSJ = lsj = node()
    lsj.ENABLED = False
    # Side in px of the square that a rescaled image is cropped to.
    lsj.IMAGE_SIZE = 1024
    # Range of the scale: 1 fits the image into the square.
    lsj.MIN_SCALE = 0.1
    lsj.MAX_SCALE = 2.0

    # Keep the weights that were best in this result, such as "bbox/AP", in model_best.pth; "": no.
    cfg.TEST.BEST_CHECKPOINT = ""


def _add_tiles(cfg: CfgNode) -> None:
    node = type(cfg)

    # Train on overlapping tiles of the images, which INPUT's other keys then resize, flip and crop.
    cfg.INPUT.TILES = tiles = node()
    tiles.ENABLED = False
    # Side in px of the image, and overlap as a fraction of it.
    tiles.SIZE = 640
    tiles.OVERLAP = 0.25
    # The fraction of an object's area from which a tile shows it; less of one is painted over with
    # MODEL.PIXEL_MEAN, so that it is neither object nor background.
    tiles.MIN_VISIBLE = 0.4
    # At most so many tiles without an object for one with; they are drawn once.
    tiles.EMPTY_RATIO = 0.1
    # Paint boxes with iscrowd 1 and regions to be ignored over with MODEL.PIXEL_MEAN in training,
    # where no object lies, so that what is unlabelled there is not learned as background.
    cfg.INPUT.FILL_IGNORED = False

    # Sliced inference: detect in overlapping tiles, each resized as INPUT.MIN_SIZE_TEST says.
    cfg.TEST.TILES = tiles = node()
    tiles.ENABLED = False
    # Side in px of the image, and overlap as a fraction of it.
    tiles.SIZE = 640
    tiles.OVERLAP = 0.25
    # Detect in the whole image as well, for objects larger than a tile.
    tiles.WHOLE_IMAGE = True
    # IoU from which two boxes of one class are one object.
    tiles.MERGE_THRESH = 0.5
    # Tiles that go through the detector at once.
    tiles.BATCH_SIZE = 4


def _add_swin(model: CfgNode) -> None:
    # Swin; the defaults are Swin-T. Both stock and Dr2Net backbones read these.
    model.SWIN = swin = type(model)()
    # Width of the first stage; it doubles with every further one.
    swin.EMBED_DIM = 96
    # Blocks and attention heads of each stage.
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    # Window side in tokens.
    swin.WINDOW_SIZE = 7
    swin.MLP_RATIO = 4.0
    swin.QKV_BIAS = True
    # Stochastic depth rate of the last block; it grows linearly from 0 at the first.
    swin.DROP_PATH_RATE = 0.2
    # Absolute positions, and the side in px of the pretraining images, which sizes their table.
    swin.APE = False
    swin.PRETRAIN_IMG_SIZE = 224
    # LayerNorm after the patch embedding.
    swin.PATCH_NORM = True
    # What stays as pretrained: -1 nothing, 0 the patch embedding, n > 1 also n - 1 stages.
    swin.FROZEN_STAGES = -1
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    swin.SQUARE_PAD = 0


def _add_mvit(model: CfgNode) -> None:
    # MViTv2; the defaults are MViTv2-T. Both stock and Dr2Net backbones read these.
    model.MVIT = mvit = type(model)()
    # Side in px that relative position tables are sized for; others are interpolated.
    mvit.IMG_SIZE = 224
    # Width and attention heads of the first stage; both double with every further one.
    mvit.EMBED_DIM = 96
    mvit.NUM_HEADS = 1
    mvit.DEPTH = 10
    # The last block of each of the four stages.
    mvit.LAST_BLOCK_INDEXES = [0, 2, 7, 9]
    # Stride of the pooled keys and values in the first stage; it halves with every further one.
    mvit.ADAPTIVE_KV_STRIDE = 4
    # Window side in tokens in the first stage; it halves with every further one.
    mvit.ADAPTIVE_WINDOW_SIZE = 56
    # Add the pooled queries to what attention gives.
    mvit.RESIDUAL_POOLING = True
    mvit.MLP_RATIO = 4.0
    mvit.QKV_BIAS = True
    # Stochastic depth rate of the last block; it grows linearly from 0 at the first.
    mvit.DROP_PATH_RATE = 0.1
    mvit.USE_ABS_POS = False
    mvit.USE_REL_POS = True
    # Side in px of the pretraining images, which sizes the absolute position table.
    mvit.PRETRAIN_IMG_SIZE = 224
    mvit.PRETRAIN_USE_CLS_TOKEN = True
    # Pad both sides of every image to a multiple of this, in px; 0: of the coarsest stride.
    mvit.SQUARE_PAD = 0


def _add_evaluation(cfg: CfgNode) -> None:
    # How boxes are counted: "coco", or as the benchmark does it, "aitod", "visdrone" or
    # "tinyperson"; see docs/evaluation.md. DETECTIONS_PER_IMAGE counts under "coco"; the others
    # have numbers of their own, which it should reach.
    cfg.TEST.PROTOCOL = "coco"
