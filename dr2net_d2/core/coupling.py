"""The dual-residual coupling of Dr2Net in floating point, and how its inverse loses precision.

Zhao et al., "Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient Finetuning",
CVPR 2024, arXiv 2401.04105, section 3. The paper carries (x_i, y_i) with y_i = beta * h_{i-1}; here
the pair is (h_i, h_{i-1}), unscaled, so that the second half is never rounded.

Legend:
    h_i     (..., C)    residual stream after step i
    f       (..., C)    F_i(h_{i-1}), the value of one residual function (no shortcut)
    alpha   scalar      weight of the ordinary shortcut, 1 in the pretrained network
    beta    scalar      weight of the second shortcut, 0 in the pretrained network
"""

from __future__ import annotations

import math

from torch import Tensor


def couple(f: Tensor, h1: Tensor, h2: Tensor, alpha: float, beta: float) -> Tensor:
    """One step forward: ``h_i = F_i(h_{i-1}) + alpha * h_{i-1} + beta * h_{i-2}``.

    Args:
        f: F_i(h_{i-1}), any floating dtype; the sum is formed in the dtype of ``h1``.
        h1: h_{i-1}.
        h2: h_{i-2}; not read at beta = 0.
    """
    h = f.to(h1.dtype).add(h1, alpha=alpha)
    return h.add(h2, alpha=beta) if beta else h


def uncouple(h: Tensor, f: Tensor, h1: Tensor, alpha: float, beta: float) -> Tensor:
    """One step back: ``h_{i-2} = (h_i - F_i(h_{i-1}) - alpha * h_{i-1}) / beta``.

    Raises:
        ZeroDivisionError: at beta = 0, where h_{i-2} has left no trace in h_i.
    """
    if beta == 0:
        raise ZeroDivisionError("beta is 0: h_i does not contain h_{i-2}; keep it instead")
    return h.sub(f.to(h1.dtype)).sub_(h1, alpha=alpha).div_(beta)


def error_growth(alpha: float, beta: float) -> float:
    """Factor by which a rounding error grows per inverted step, without F's own Jacobian.

    The error of ``uncouple`` obeys ``beta * e_{i-2} + alpha * e_{i-1} - e_i = 0``; the factor is
    the largest root of ``beta r^2 + alpha r - 1 = 0``: 10.9 at (1, 0.1), 1 / beta at
    alpha = 1 - beta, 1 at (0, 1), infinite at beta = 0.
    """
    if beta == 0:
        return math.inf
    return (alpha + math.sqrt(alpha * alpha + 4 * beta)) / (2 * beta)


def stream_growth(alpha: float, beta: float) -> float:
    """Factor by which the streams can grow per step, without what F adds.

    The largest root of ``r^2 = alpha r + beta``: at most 1 for alpha + beta <= 1, 1.09 at (1, 0.1),
    1.62 at (1, 1).
    """
    return (alpha + math.sqrt(alpha * alpha + 4 * beta)) / 2
