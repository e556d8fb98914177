"""The method, in PyTorch alone: reversible dual-residual coupling, the ViT, the pyramid."""

from dr2net_d2.core.coefficients import Coefficients
from dr2net_d2.core.pyramid import SimpleFeaturePyramid
from dr2net_d2.core.reversible import ReversibleSequence, reversible_stacks
from dr2net_d2.core.schedule import CoefficientSchedule
from dr2net_d2.core.vit import Dr2NetViT

__all__ = [
    "Coefficients",
    "CoefficientSchedule",
    "Dr2NetViT",
    "ReversibleSequence",
    "SimpleFeaturePyramid",
    "reversible_stacks",
]
