"""What both engines do around an iteration.

In: a model, a config, an iteration. Out: an optimizer, coefficients that have moved, an error
where a value is not finite, and pictures of the finished training.
"""

from dr2net_d2.training.coefficients import (
    format_coefficients,
    passed_pairs,
    update_coefficients,
    value_range,
)
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
    "format_coefficients",
    "non_finite",
    "passed_pairs",
    "read_metrics",
    "update_coefficients",
    "value_range",
]
