"""A detector small enough to train within a second, as YAML, config and command line."""

import argparse
import traceback
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from dr2net_d2.config import merge_config
from dr2net_d2.d2 import add_dr2net_config

YAML = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_dr2net_vitdet_backbone}
  VIT:
    {IMG_SIZE: 64, PATCH_SIZE: 8, EMBED_DIM: 32, DEPTH: 2, NUM_HEADS: 4, DROP_PATH_RATE: 0.2,
     WINDOW_SIZE: 3, WINDOW_BLOCK_INDEXES: [0], PRETRAIN_IMG_SIZE: 32, SCALE_FACTORS: [2.0, 1.0]}
  FPN: {OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32]], ASPECT_RATIOS: [[1.0]]}
  RPN: {IN_FEATURES: [p2, p3, p4], PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 30,
        PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TEST: 30, BATCH_SIZE_PER_IMAGE: 32}
  ROI_HEADS:
    {NAME: StandardROIHeads, IN_FEATURES: [p2, p3], NUM_CLASSES: 10, BATCH_SIZE_PER_IMAGE: 16,
     SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 3}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}
DATASETS:
  TRAIN: ["small_digits_train_n8_s64_d3"]
  TEST: ["small_digits_val_n4_s64_d3"]
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {OPTIMIZER: AdamW, BASE_LR: 0.001, LAYER_DECAY: 0.9, IMS_PER_BATCH: 2, MAX_ITER: 8,
         STEPS: [6], WARMUP_ITERS: 2, CHECKPOINT_PERIOD: 4}
TEST: {EVAL_PERIOD: 4}
SEED: 3
VERSION: 2
"""


def write_yaml(folder: Path) -> str:
    path = Path(folder, "tiny.yaml")
    path.write_text(YAML)
    return str(path)


def arguments(folder: Path, *opts, eval_only=False, resume=False, num_gpus=1):
    """The parsed arguments of train_net.py for the tiny config; output is in ``folder``/output."""
    return argparse.Namespace(
        config_file=write_yaml(folder),
        opts=["OUTPUT_DIR", str(folder / "output"), *map(str, opts)],
        eval_only=eval_only,
        resume=resume,
        num_gpus=num_gpus,
        num_machines=1,
        machine_rank=0,
        dist_url="auto",
    )


def tiny_cfg(folder: Path, *opts):
    cfg = get_cfg()
    add_dr2net_config(cfg)
    merge_config(cfg, write_yaml(folder), [str(word) for word in opts])
    return cfg


def batch(*sizes, objects=3, seed=0):
    """Inputs as from Detectron2's mapper: random images of sizes (H, W) with boxes."""
    rng = np.random.default_rng(seed)
    inputs = []
    for height, width in sizes:
        corners = rng.uniform(0, (width / 2, height / 2), (objects, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 20, (objects, 2))], axis=1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.as_tensor(rng.integers(0, 10, objects))
        pixels = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
        inputs.append(
            {"image": torch.as_tensor(pixels), "instances": instances,
             "height": height, "width": width}
        )  # fmt: skip
    return inputs


def save_detector(file: Path) -> nn.Module:
    """Saves the tiny detector at beta 1/2, with weights large enough to tell images apart."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg(file.parent)).eval()
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.backbone.net.coefficients.set(0.5, 0.5)
    torch.save({"model": model.state_dict()}, file)
    return model


def launch_one(work, *_, args):
    """A fake of Detectron2's ``launch``: one process, whose error comes back as text."""
    try:
        work(*args)
    except Exception as error:
        raise ProcessRaisedException(traceback.format_exc(), 0, 1) from error


def rates_and_decays(groups):
    """Parameter -> (learning rate, weight decay), from the groups of an optimizer."""
    return {
        parameter: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
