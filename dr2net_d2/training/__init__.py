"""Parts of a training that both engines share.

The optimizer, the update of the coefficients, guards against values that are not finite, and
pictures of a finished training.
"""

from dr2net_d2.training.coefficients import update_coefficients
from dr2net_d2.training.guards import (
    GradientGuard,
    check_gradients,
    check_losses,
    divergence_at,
    non_finite,
)
from dr2net_d2.training.optimizer import build_optimizer
from dr2net_d2.training.pictures import draw_curves, draw_predictions, read_metrics

__all__ = [
    "GradientGuard",
    "build_optimizer",
    "check_gradients",
    "check_losses",
    "divergence_at",
    "draw_curves",
    "draw_predictions",
    "non_finite",
    "read_metrics",
    "update_coefficients",
]
