"""Load the trained detector of a config, with the engine that a command names."""

from __future__ import annotations

import argparse

from fvcore.common.config import CfgNode
from torch import nn

from dr2net_d2.commands import choose_engine, load_config, torch_device
from dr2net_d2.errors import ConfigError
from dr2net_d2.inference.detections import Predictor


def open_config(args: argparse.Namespace) -> tuple[CfgNode, str]:
    """The checked config of a command's arguments, and its engine, "detectron2" or "torchvision".

    Raises:
        ConfigError: the config cannot be used, MODEL.WEIGHTS is empty, or MODEL.DEVICE cannot be
            used here.
    """
    engine = choose_engine(args.engine)
    cfg = load_config(args.config_file, args.opts, engine)
    if engine == "torchvision":
        from dr2net_d2.config.torchvision import check_config

        check_config(cfg)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "MODEL.WEIGHTS is empty; add the weights of a trained detector to the command line, "
            "such as MODEL.WEIGHTS output/quickstart/model_final.pth"
        )
    torch_device(cfg.MODEL.DEVICE)
    return cfg, engine


def load_predictor(cfg: CfgNode, engine: str) -> Predictor:
    """The trained detector of a config, for single images.

    Args:
        cfg: a config of the engine with MODEL.WEIGHTS, such as ``open_config`` returns.
        engine: "detectron2" or "torchvision".

    Raises:
        UserError: the config cannot be used, or the weights lack a part of the detector.
    """
    if engine == "detectron2":
        from dr2net_d2.inference.detectron2 import Detectron2Predictor

        return Detectron2Predictor(cfg)
    from dr2net_d2.inference.torchvision import TorchvisionPredictor

    return TorchvisionPredictor(cfg)


def load_model(cfg: CfgNode, engine: str) -> nn.Module:
    """The same detector as a module, in evaluation mode on MODEL.DEVICE; see ``load_predictor``."""
    if engine == "detectron2":
        from dr2net_d2.d2.predictor import load_detector
    else:
        from dr2net_d2.tv.predictor import load_detector
    return load_detector(cfg)
