"""projects/*/configs made small, with the datasets that they name in the original layout."""

import argparse
from pathlib import Path

from dr2net_d2.data.commands import main as data_command

CONFIGS = sorted((Path(__file__).parents[1] / "projects").glob("*/configs/*.yaml"))

_SMALL = """
MODEL:
  DEVICE: cpu
  WEIGHTS: {weights}
  VIT: {{IMG_SIZE: 64, EMBED_DIM: 32, DEPTH: 4, NUM_HEADS: 4, WINDOW_SIZE: 3,
        WINDOW_BLOCK_INDEXES: [0, 1], PRETRAIN_IMG_SIZE: 32, SQUARE_PAD: 128}}
  FPN: {{OUT_CHANNELS: 64}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 30, PRE_NMS_TOPK_TEST: 50,
        POST_NMS_TOPK_TEST: 30}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}}
  ROI_BOX_HEAD: {{CONV_DIM: 8, FC_DIM: 16}}
INPUT:
  MIN_SIZE_TRAIN: [128]
  MAX_SIZE_TRAIN: 128
  MIN_SIZE_TEST: 128
  MAX_SIZE_TEST: 128
  LSJ: {{IMAGE_SIZE: 128}}
  TILES: {{SIZE: 96}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: [], AMP: {{ENABLED: False}}}}
TEST: {{TILES: {{SIZE: 96}}}}
"""

_SAMPLES = {
    "VisDrone": ("visdrone", "VisDrone2019-DET-val", "VisDrone2019-DET-train"),
    "AITOD": (
        "aitod",
        "annotations/aitod_train.json",
        "annotations/aitod_trainval.json",
        "annotations/aitod_test.json",
    ),
    "TinyPerson": (
        "tinyperson",
        "annotations/tiny_set_train.json",
        "annotations/tiny_set_test.json",
    ),
}


def write_datasets(project, root):
    """The training and the test part of a project's dataset, both the sample of its format."""
    kind, first, *others = _SAMPLES[project]
    folder = root / {"AITOD": "AI-TOD"}.get(project, project)
    assert data_command(["sample", kind, str(folder)]) == 0
    for other in others:
        (folder / other).symlink_to(folder / first)
    for part in {"AITOD": ("trainval", "test"), "TinyPerson": ("test",)}.get(project, ()):
        images = folder / ("images" if project == "AITOD" else ".")
        (images / part).symlink_to(images / "train")


def small_config(path, folder, weights=""):
    """A config of few parameters that derives from a shipped one."""
    file = folder / f"small_{path.stem}.yaml"
    file.write_text(f"_BASE_: {path}\n" + _SMALL.format(weights=f'"{weights}"'))
    return file


def arguments(config, output, *opts, **flags):
    """Of train_net.py."""
    flags = {"eval_only": False, "resume": False, "num_gpus": 1, "num_machines": 1} | flags
    opts = ["OUTPUT_DIR", str(output), "SEED", "1", *opts]
    return argparse.Namespace(
        config_file=str(config), opts=opts, machine_rank=0, dist_url="auto", **flags
    )
