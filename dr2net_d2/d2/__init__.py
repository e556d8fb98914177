"""The Detectron2 engine. Importing it registers the backbone builders and FCOS.

In: a YAML config or LazyConfig of Detectron2. Out: a detector that is trained, evaluated and
resumed by ``run``; or its parts, for a training script of one's own.
"""

from dr2net_d2.config import add_dr2net_config
from dr2net_d2.d2.backbone import (
    Dr2NetBackbone,
    Dr2NetPyramid,
    build_dr2net_vit_backbone,
    build_dr2net_vitdet_backbone,
    build_vit_backbone,
    build_vitdet_backbone,
    without_cropping,
)
from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer
from dr2net_d2.d2.data import register_dataset
from dr2net_d2.d2.detector import build_detector, make_lean
from dr2net_d2.d2.engine import run
from dr2net_d2.d2.evaluation import ProtocolEvaluator
from dr2net_d2.d2.fcos import FCOS
from dr2net_d2.d2.fpn import (
    build_dr2net_mvit_fpn_backbone,
    build_dr2net_swin_fpn_backbone,
    build_mvit_fpn_backbone,
    build_swin_fpn_backbone,
)
from dr2net_d2.d2.hooks import (
    BestWeights,
    CoefficientHook,
    LossNormalizer,
    MovingAverage,
    NonFiniteGuard,
    PeakMemory,
    SeedIterations,
)
from dr2net_d2.d2.predictor import Predictor
from dr2net_d2.d2.stages import Dr2NetMViT, Dr2NetSwin
from dr2net_d2.d2.trainer import Settings, Trainer

__all__ = [
    "BestWeights",
    "CoefficientHook",
    "Dr2NetBackbone",
    "Dr2NetCheckpointer",
    "Dr2NetMViT",
    "Dr2NetPyramid",
    "Dr2NetSwin",
    "FCOS",
    "LossNormalizer",
    "MovingAverage",
    "NonFiniteGuard",
    "PeakMemory",
    "Predictor",
    "ProtocolEvaluator",
    "SeedIterations",
    "Settings",
    "Trainer",
    "add_dr2net_config",
    "build_detector",
    "build_dr2net_mvit_fpn_backbone",
    "build_dr2net_swin_fpn_backbone",
    "build_dr2net_vit_backbone",
    "build_dr2net_vitdet_backbone",
    "build_mvit_fpn_backbone",
    "build_swin_fpn_backbone",
    "build_vit_backbone",
    "build_vitdet_backbone",
    "make_lean",
    "register_dataset",
    "run",
    "without_cropping",
]
