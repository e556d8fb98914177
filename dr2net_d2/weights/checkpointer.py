"""Checkpoints of detectors: written atomically, loaded completely or not at all.

For both engines, as it builds on fvcore's ``Checkpointer``, the base class of Detectron2's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn

from dr2net_d2.core.ranks import whole
from dr2net_d2.errors import WeightsError, weights_being_read
from dr2net_d2.training import non_finite
from dr2net_d2.weights.detectors import convert_detector_checkpoint
from dr2net_d2.weights.files import read_checkpoint
from dr2net_d2.weights.plain_vit import convert_vit_checkpoint
from dr2net_d2.weights.report import Converted

PACKAGED = "dr2net_d2://"
"""Prefix in MODEL.WEIGHTS of weights that come with the package, as in dr2net_d2://micro_vit."""

MAX_LISTED = 8
"""Problems that an error lists; the rest are only counted."""


def locate_weights(path: str) -> str:
    """The file that MODEL.WEIGHTS names; URLs and "" (random weights) are returned unchanged.

    Raises:
        WeightsError: the file does not exist.
    """
    if path.startswith(PACKAGED):
        name = path.removeprefix(PACKAGED)
        path = str(files("dr2net_d2").joinpath("weights", "pretrained", f"{name}.safetensors"))
    # In Detectron2, options may follow a question mark.
    if path and "://" not in path and not Path(path.partition("?")[0]).is_file():
        raise WeightsError(f"weights {path!r} do not exist; check MODEL.WEIGHTS")
    return path


def find_vit(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the plain ViT in a detector, whatever its class; None if there is none."""
    for name, module in model.named_modules():
        if hasattr(module, "patch_embed") and hasattr(module, "blocks"):
            return name, module
    return None


Converter = Callable[[Mapping[str, Tensor], nn.Module], Converted]
"""(checkpoint, model) -> tensors to load, and the report."""


def fit_checkpoint(
    convert: Converter,
    state: Mapping[str, Tensor],
    model: nn.Module,
    allow_partial: Sequence[str],
) -> Converted:
    """Convert a checkpoint, and refuse it if it does not fit completely.

    Args:
        convert: the conversion.
        state: the checkpoint, key -> tensor.
        model: the model to load; it is not changed.
        allow_partial: patterns of keys that need not fit.

    Raises:
        WeightsError: the checkpoint cannot be converted, or other keys do not fit.
    """
    with weights_being_read():
        converted, report = convert(state, model)
    problems = report.problems(allow_partial)
    if problems:
        listed = problems[:MAX_LISTED]
        if len(problems) > MAX_LISTED:
            listed.append(f"and {len(problems) - MAX_LISTED} more")
        raise WeightsError(
            f"the weights ({report.source}) do not fit; check the model's keys in the config, such "
            "as MODEL.VIT.*, or allow keys by pattern (MODEL.DR2NET.ALLOW_PARTIAL): "
            f"{'; '.join(listed)}"
        )
    return converted, report


class StrictCheckpointer(Checkpointer):
    """fvcore's checkpointer with atomic writes, and without silent partial loads.

    A checkpoint that has keys of the detector outside its ViT must fit the whole detector. Any
    other is converted as a plain ViT of a format in ``weights.formats``; with Detectron2 also as a
    Swin or MViTv2. What became of every key is logged.

    Args:
        model: the detector.
        save_dir: the folder of the checkpoints; nothing is saved if it is empty.
        allow_partial: patterns of keys, as errors name them, that may be missing, unexpected or of
            another shape, for example ``roi_heads.box_predictor.*`` for other classes.
        plain_vit: accept a plain ViT, which leaves the heads random.
        **checkpointables: further objects with a state, such as the optimizer.

    Raises:
        WeightsError: on ``load``, if the file is missing or unreadable or does not fit; the model
            is unchanged then.
        FloatingPointError: on ``save``, if a weight is not finite; the files are unchanged then.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_partial: Sequence[str] = (),
        plain_vit: bool = True,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._allow_partial = tuple(allow_partial)
        self._plain_vit = plain_vit

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir:
            return
        kwargs.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        self.save_weights(name, **kwargs)
        if self.save_to_disk:
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **others: Any) -> None:
        """Write the weights of the model, and ``others``, to ``name``.pth.

        If anything is sharded, all processes have to call this; those with ``save_to_disk`` write.
        """
        parameters = dict(self.model.named_parameters())
        bad = non_finite(parameters)
        if bad:
            raise FloatingPointError(
                f"{bad[0]} is not finite after the optimizer's step ({len(bad)} of "
                f"{len(parameters)} parameters); {name}.pth has not been written"
            )
        model = self.model.state_dict()
        # In place, because a state dict has its versions in an attribute.
        model.update(whole(dict(model), self.save_to_disk))
        others = whole(others, self.save_to_disk)
        if not self.save_to_disk:
            return
        target = Path(self.save_dir, f"{name}.pth")
        partial = target.with_suffix(".pth.partial")
        torch.save({"model": model, **others}, partial)
        partial.replace(target)
        self.logger.info("Saved checkpoint %s", target)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        target = Path(self.save_dir, "last_checkpoint")
        partial = target.with_suffix(".partial")
        partial.write_text(last_filename_basename)
        partial.replace(target)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            extra: dict[str, Any] = super().load(locate_weights(path), *args, **kwargs)
        except (AssertionError, OSError) as error:  # from a URL without a file
            raise WeightsError(
                f"weights {path!r} cannot be fetched ({error}); download the file and set "
                "MODEL.WEIGHTS to its path"
            ) from error
        return extra

    def _load_file(self, f: str) -> dict[str, Any]:
        return read_checkpoint(f)

    def _pretrained_part(self) -> tuple[str, nn.Module, Converter] | None:
        """Name, module and converter of the backbone; None if it is of no kind that we convert."""
        vit = find_vit(self.model)
        if vit is None:
            return None
        return *vit, convert_vit_checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        backbone = self._pretrained_part()
        if backbone is None:
            return super()._load_model(checkpoint)
        state = checkpoint.pop("model")
        prefix, model, convert = backbone
        head_keys = {key for key in self.model.state_dict() if not key.startswith(prefix)}
        if any(key.removeprefix("module.") in head_keys for key in state):
            model, convert = self.model, convert_detector_checkpoint
        elif not self._plain_vit:
            raise WeightsError(
                "the weights have no key of this detector's heads, so they are a backbone or "
                "another model; set MODEL.WEIGHTS to a trained detector, such as "
                "OUTPUT_DIR/model_final.pth"
            )
        converted, report = fit_checkpoint(convert, state, model, self._allow_partial)
        model.load_state_dict(converted, strict=False)
        self.logger.info("Weights: %s", "; ".join(report.lines(brief=True)))
        return None


def load_weights(
    checkpointer: type[StrictCheckpointer], model: nn.Module, weights: str
) -> nn.Module:
    """Load all weights of a trained detector, and set it to evaluation mode.

    Args:
        checkpointer: the engine's checkpointer.
        model: the detector.
        weights: MODEL.WEIGHTS.

    Returns:
        The detector.

    Raises:
        WeightsError: the file is missing or unreadable, or is not of the whole detector.
    """
    checkpointer(model, plain_vit=False).load(weights, checkpointables=[])
    return model.eval()
