"""Weights in and out: files, formats of pretrained networks, conversion, checkpoints.

In: a file (``read_checkpoint``). Out: its tensors fitted to a model, with a report on every key
(``convert_*``, ``StrictCheckpointer``), or an error; files for others (``write_weights``).
"""

from dr2net_d2.weights.checkpointer import (
    Converter,
    StrictCheckpointer,
    fit_checkpoint,
    load_weights,
    locate_weights,
)
from dr2net_d2.weights.files import WRITERS, check_output, read_checkpoint, write_weights
from dr2net_d2.weights.formats import describe_vit, find_plain_vit, matches
from dr2net_d2.weights.matching import COEFFICIENTS, redundant_scalars
from dr2net_d2.weights.plain_vit import convert_vit_checkpoint, plain_vit_state_dict
from dr2net_d2.weights.report import CheckpointReport
from dr2net_d2.weights.stages import convert_stages_checkpoint

__all__ = [
    "COEFFICIENTS",
    "WRITERS",
    "CheckpointReport",
    "Converter",
    "StrictCheckpointer",
    "check_output",
    "convert_stages_checkpoint",
    "convert_vit_checkpoint",
    "describe_vit",
    "find_plain_vit",
    "fit_checkpoint",
    "load_weights",
    "locate_weights",
    "matches",
    "plain_vit_state_dict",
    "read_checkpoint",
    "redundant_scalars",
    "write_weights",
]
