"""The method, in PyTorch alone: reversible dual-residual coupling, the ViT, the pyramid."""

from dr2net_d2.core.coefficients import Coefficients, coefficients_at
from dr2net_d2.core.pyramid import SimpleFeaturePyramid
from dr2net_d2.core.reversible import ReversibleSequence, reversible_stacks
from dr2net_d2.core.schedule import CoefficientSchedule, Schedule
from dr2net_d2.core.vit import Dr2NetViT

__all__ = [
    "Coefficients",
    "CoefficientSchedule",
    "Dr2NetViT",
    "ReversibleSequence",
    "Schedule",
    "SimpleFeaturePyramid",
    "coefficients_at",
    "reversible_stacks",
]
