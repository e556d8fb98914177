"""Weights in and out: files, formats of pretrained networks, conversion, checkpoints of trainings.

In: a file that somebody has. Out: a model with all of its weights and a report on every key, or an
error; and files that Detectron2 reads.
"""

from dr2net_d2.weights.checkpointer import (
    Converter,
    StrictCheckpointer,
    find_vit,
    fit_checkpoint,
    load_weights,
    locate_weights,
)
from dr2net_d2.weights.files import WRITERS, check_output, read_checkpoint, write_weights
from dr2net_d2.weights.formats import describe_vit, find_plain_vit, matches
from dr2net_d2.weights.plain_vit import (
    COEFFICIENTS,
    CheckpointReport,
    convert_stages_checkpoint,
    convert_vit_checkpoint,
    plain_vit_state_dict,
    redundant_scalars,
)

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
    "find_vit",
    "fit_checkpoint",
    "load_weights",
    "locate_weights",
    "matches",
    "plain_vit_state_dict",
    "read_checkpoint",
    "redundant_scalars",
    "write_weights",
]
