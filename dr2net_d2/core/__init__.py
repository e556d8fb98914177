"""The method, in PyTorch alone: reversible dual-residual coupling, the ViT, the pyramid.

In: residual functions and coefficients that move during finetuning. Out: an ``nn.Module`` for
ordinary autograd that recovers its activations in the backward instead of storing them.
"""

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
