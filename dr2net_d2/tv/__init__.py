"""The torchvision engine: its Faster R-CNN on our backbone, by Detectron2's config keys.

In: a YAML config. Out: a detector that is trained, evaluated and resumed by ``engine.run``, with
the same files in the output folder as Detectron2 leaves.
"""

from dr2net_d2.config.torchvision import get_cfg
from dr2net_d2.tv.model import build_model

__all__ = ["build_model", "get_cfg"]
