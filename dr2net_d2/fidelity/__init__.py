"""Is the gradient right, and what does it cost? Four ways to compute it, compared with float64.

In: a ViT, an image, pairs of coefficients. Out: errors and bytes, one row for each way and pair.
"""

from dr2net_d2.fidelity.gradients import (
    ARMS,
    Measurement,
    choose_reference,
    format_error,
    measure,
    measure_all,
    schedule_pairs,
)
from dr2net_d2.fidelity.picture import draw_fidelity

__all__ = [
    "ARMS",
    "Measurement",
    "choose_reference",
    "draw_fidelity",
    "format_error",
    "measure",
    "measure_all",
    "schedule_pairs",
]
