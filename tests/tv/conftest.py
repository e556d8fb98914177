"""A detector small enough to train in seconds, its config file, and the arguments of a run."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode

from dr2net_d2.config import merge_config
from dr2net_d2.config.torchvision import check_config, get_cfg

TINY = """
MODEL:
  DEVICE: cpu
  PIXEL_MEAN: [127.5, 127.5, 127.5]
  PIXEL_STD: [64.0, 64.0, 64.0]
  BACKBONE: {NAME: build_dr2net_vitdet_backbone}
  VIT:
    IMG_SIZE: 64
    PATCH_SIZE: 8
    EMBED_DIM: 32
    DEPTH: 2
    NUM_HEADS: 2
    DROP_PATH_RATE: 0.2
    WINDOW_SIZE: 4
    WINDOW_BLOCK_INDEXES: [0]
    PRETRAIN_IMG_SIZE: 64
    SCALE_FACTORS: [2.0, 1.0]
  FPN: {OUT_CHANNELS: 16}
  ANCHOR_GENERATOR:
    SIZES: [[10], [20], [40]]
  RPN:
    IN_FEATURES: [p2, p3, p4]
    PRE_NMS_TOPK_TRAIN: 50
    PRE_NMS_TOPK_TEST: 50
    POST_NMS_TOPK_TRAIN: 30
    POST_NMS_TOPK_TEST: 30
  ROI_HEADS:
    IN_FEATURES: [p2, p3]
    NUM_CLASSES: 10
    BATCH_SIZE_PER_IMAGE: 16
    SCORE_THRESH_TEST: 0.0
  ROI_BOX_HEAD: {NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 4}
INPUT:
  MIN_SIZE_TRAIN: (56, 64)
  MAX_SIZE_TRAIN: 64
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 64
DATASETS:
  TRAIN: ("small_digits_train_n8_s64_d3",)
  TEST: ("small_digits_val_n4_s64_d3",)
DATALOADER: {NUM_WORKERS: 0}
SOLVER:
  OPTIMIZER: AdamW
  IMS_PER_BATCH: 2
  MAX_ITER: 8
  CHECKPOINT_PERIOD: 4
  LR_SCHEDULER_NAME: WarmupCosineLR
  WARMUP_ITERS: 2
TEST: {EVAL_PERIOD: 4}
SEED: 1
"""


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-for-bit comparisons need one number of threads; small tensors need no more than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DR2NET_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny_cfg(config_file: Path) -> Callable[..., CfgNode]:
    """``tiny_cfg("KEY", "VALUE", ...)``: the checked config with overrides."""

    def build(*opts: str) -> CfgNode:
        cfg = get_cfg()
        merge_config(cfg, str(config_file), opts)
        check_config(cfg)
        return cfg

    return build


@pytest.fixture(scope="session")
def arguments(config_file: Path) -> Callable[..., argparse.Namespace]:
    """``arguments("KEY", "VALUE", ..., resume=True)``: what ``train_net.py`` passes on."""

    def build(
        *opts: str, eval_only: bool = False, resume: bool = False, num_gpus: int = 1
    ) -> argparse.Namespace:
        return argparse.Namespace(
            config_file=str(config_file),
            opts=list(opts),
            eval_only=eval_only,
            resume=resume,
            num_gpus=num_gpus,
        )

    return build
