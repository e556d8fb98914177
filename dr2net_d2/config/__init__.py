"""Config keys: their ranges and meaning, and what a config says in terms of the wings below.

In: YAML files and KEY VALUE overrides, on the defaults of either engine. Out: arguments, schedules,
protocols, and errors that name the key.
"""

from dr2net_d2.config.detection import (
    box_limits,
    build_slicing,
    category_names,
    check_categories,
    check_weights_to_evaluate,
    evaluation_protocol,
    head_section,
    warn_of_limits,
)
from dr2net_d2.config.keys import add_dr2net_config
from dr2net_d2.config.merging import merge_config, value_of
from dr2net_d2.config.model_keys import LEAN_PARTS
from dr2net_d2.config.network import (
    BACKBONE_SECTIONS,
    backbone_section,
    dr2net_arguments,
    lean_parts,
    require_plain_vit,
    vit_arguments,
)
from dr2net_d2.config.training import (
    amp_dtype,
    check_jittering,
    coefficient_schedule,
    training_tiles,
)

__all__ = [
    "BACKBONE_SECTIONS",
    "LEAN_PARTS",
    "add_dr2net_config",
    "amp_dtype",
    "backbone_section",
    "box_limits",
    "build_slicing",
    "category_names",
    "check_categories",
    "check_jittering",
    "check_weights_to_evaluate",
    "coefficient_schedule",
    "dr2net_arguments",
    "evaluation_protocol",
    "head_section",
    "lean_parts",
    "merge_config",
    "require_plain_vit",
    "training_tiles",
    "value_of",
    "vit_arguments",
    "warn_of_limits",
]
