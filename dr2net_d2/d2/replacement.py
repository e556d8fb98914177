"""Modules that take the places of others in a detector that has already been built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Replacement:
    """Mixin, the first base of a class whose objects continue a module of its second base.

    The replacement has the very parameters, buffers, children, hooks and attributes of the other
    module, so the state dict stays the same, and nothing is copied or drawn at random. The other
    module is not to be used any more; ``replace_modules`` puts the replacement in its place.

    Args:
        module: what to continue.
    """

    def __init__(self: Any, module: nn.Module) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(module))


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put modules in the places of others, under every name that these have in the model.

    Args:
        model: changed in place; it cannot itself be replaced.
        replacements: module of the model -> its replacement.
    """
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module in replacements:
            model.set_submodule(name, replacements[module])
