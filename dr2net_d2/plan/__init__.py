"""Will a training fit? One iteration on tensors without storage, every byte of it counted.

In: a config, an image size, a batch. Out: the peak of memory and what it consists of.
"""

from dr2net_d2.plan.planner import Planner, Prediction, predict

__all__ = ["Planner", "Prediction", "predict"]
