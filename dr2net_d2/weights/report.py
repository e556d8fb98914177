"""The account of a conversion: what became of every key of the checkpoint and of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dr2net_d2.weights.formats import matches

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape in the checkpoint, shape in the model."""


@dataclass
class CheckpointReport:
    """What became of every key.

    Every key of the checkpoint is in exactly one of ``loaded``, ``resized``, ``folded``,
    ``dropped``, ``unexpected`` and ``mismatched``. The other lists have keys of the model.

    Attributes:
        source: format of the checkpoint, and the prefix of the ViT in it.
        loaded: loaded unchanged.
        resized: position tables and patch embeddings -> their shapes.
        folded: LayerScale -> the layer that it was multiplied into.
        dropped: key -> why the model does without it.
        initialized: keys of the model that no checkpoint of this format has; finetuning learns
            them from their initial values.
        missing: keys of the model that the checkpoint should have, but does not.
        unexpected: keys of the checkpoint that the model does not have.
        mismatched: keys that could not be loaded -> their shapes.
        differences: phrases such as "depth is 12 in the weights, but 24 in the model".
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, Shapes] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initialized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, Shapes] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def problems(self, allow: Sequence[str] = ()) -> list[str]:
        """Phrases for everything that makes the load incomplete; empty if it is complete.

        Args:
            allow: patterns of keys that may be missing, unexpected or of another shape.
        """
        partial = [
            *(f"missing {key}" for key in self.missing if not matches(key, allow)),
            *(f"unexpected {key}" for key in self.unexpected if not matches(key, allow)),
            *(
                f"{key} is {old}, but {new} in the model"
                for key, (old, new) in self.mismatched.items()
                if not matches(key, allow)
            ),
        ]
        return [*self.differences, *_condensed(partial)] if partial else []

    def lines(self, brief: bool = False) -> list[str]:
        """One line per outcome; keys that differ only in the number of the block are merged.

        Args:
            brief: only count the keys that were loaded unchanged or left out for a reason.
        """
        lines = [f"source: {self.source}"]
        routine: dict[str, list[str]] = {"loaded": self.loaded}
        for key, why in self.dropped.items():
            routine.setdefault(f"left out, {why}", []).append(key)
        for outcome, keys in routine.items():
            line = f"{outcome} ({len(keys)})"
            lines.append(line if brief else f"{line}: {', '.join(_condensed(keys))}")
        notable = {
            "resized": [f"{key} {old} -> {new}" for key, (old, new) in self.resized.items()],
            "folded": [f"{key} into {layer}" for key, layer in self.folded.items()],
            "newly initialized": self.initialized,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": [
                f"{key} {old}, but {new} in the model"
                for key, (old, new) in self.mismatched.items()
            ],
        }
        for outcome, phrases in notable.items():
            if phrases:
                lines.append(f"{outcome} ({len(phrases)}): {', '.join(_condensed(phrases))}")
        return lines


Converted = tuple[dict[str, Tensor], CheckpointReport]
"""Tensors under the model's names, ready to load, and the report."""


def _condensed(phrases: Iterable[str]) -> list[str]:
    """Merge phrases that differ only in numbers between dots: "blocks.*.norm1.bias (12x)"."""
    groups: dict[str, list[str]] = {}
    for phrase in phrases:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", phrase), []).append(phrase)
    return [
        group[0] if len(group) == 1 else f"{star} ({len(group)}x)" for star, group in groups.items()
    ]
