"""Will a training fit? One iteration on tensors without storage, with every byte counted.

In: a config, an image size, a batch size. Out: the peak of memory and what it consists of.
"""

from dr2net_d2.plan.arms import ARMS
from dr2net_d2.plan.planner import Planner, Prediction, predict

__all__ = ["ARMS", "Planner", "Prediction", "predict"]
