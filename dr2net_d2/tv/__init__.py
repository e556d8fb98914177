"""The torchvision engine: its Faster R-CNN on our backbone, configured by Detectron2's keys."""

from dr2net_d2.config.torchvision import get_cfg
from dr2net_d2.tv.model import build_model

__all__ = ["build_model", "get_cfg"]
