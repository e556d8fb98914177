"""What a training needs around its loop, whichever engine runs it.

In: a model, a config, an iteration. Out: an optimizer, coefficients that move, a stop at what is
not finite, and curves of what was logged.
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
