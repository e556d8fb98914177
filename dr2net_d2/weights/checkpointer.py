"""Checkpoints of detectors: written atomically, loaded completely or not at all.

Builds on fvcore's ``Checkpointer``, which Detectron2's derives from, so both engines use it.
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
from dr2net_d2.weights.files import read_checkpoint
from dr2net_d2.weights.plain_vit import Converted, convert_vit_checkpoint, fit_detector_checkpoint

PACKAGED = "dr2net_d2://"
"""Prefix of MODEL.WEIGHTS for weights that the package ships, such as dr2net_d2://micro_vit."""


def locate_weights(path: str) -> str:
    """The file that MODEL.WEIGHTS names; URLs and "" (random weights) come back as they are.

    Raises:
        WeightsError: there is no such file.
    """
    if path.startswith(PACKAGED):
        name = path.removeprefix(PACKAGED)
        path = str(files("dr2net_d2").joinpath("weights", "pretrained", f"{name}.safetensors"))
    # Detectron2 takes options behind a question mark.
    if path and "://" not in path and not Path(path.partition("?")[0]).is_file():
        raise WeightsError(f"weights {path!r} do not exist; check MODEL.WEIGHTS")
    return path


def find_vit(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(name, module) of the plain ViT inside a detector, of whichever class; None without one."""
    for name, module in model.named_modules():
        if hasattr(module, "patch_embed") and hasattr(module, "blocks"):
            return name, module
    return None


Converter = Callable[[Mapping[str, Tensor], nn.Module], Converted]
"""(checkpoint, model) -> what fits, and the report."""


def fit_checkpoint(
    convert: Converter,
    state: Mapping[str, Tensor],
    model: nn.Module,
    allow_partial: Sequence[str],
) -> Converted:
    """What ``convert`` makes of a checkpoint for a model.

    Raises:
        WeightsError: it cannot, or the checkpoint fits in part only, beyond the patterns in
            ``allow_partial``.
    """
    with weights_being_read():
        converted, report = convert(state, model)
    if problems := report.problems(allow_partial):
        rest = f"; and {len(problems) - 8} more" * (len(problems) > 8)
        raise WeightsError(
            f"the weights ({report.source}) do not fit; check what the config says of the model, "
            "such as MODEL.VIT.*, or allow keys by pattern (MODEL.DR2NET.ALLOW_PARTIAL): "
            f"{'; '.join(problems[:8])}{rest}"
        )
    return converted, report


class StrictCheckpointer(Checkpointer):
    """fvcore's checkpointer with atomic writes, and without silent partial loads.

    A checkpoint without a key of the detector outside its ViT is taken for a plain ViT, of any
    format in ``weights.formats``, and converted; with Detectron2 also Swin and MViTv2.
    Anything else must fit the whole detector. What became of every key is logged.

    Args:
        allow_partial: patterns of keys, as errors name them, that may be missing, superfluous or of
            another shape, for example ``roi_heads.box_predictor.*`` for other classes.
        plain_vit: False refuses a plain ViT, which leaves the heads random.

    Raises:
        WeightsError: on ``load``, if the file is missing or unreadable, or keys are left over; the
            model is unchanged then.
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
        """Write the model, and nothing that a training could be resumed from but ``others``.

        Where either is sharded, all processes have to call; the one with ``save_to_disk`` writes.
        """
        parameters = dict(self.model.named_parameters())
        if bad := non_finite(parameters):
            raise FloatingPointError(
                f"{bad[0]}, one of {len(bad)} such among {len(parameters)} parameters, is not "
                f"finite after the optimizer's step; {name}.pth has not been written"
            )
        model = self.model.state_dict()
        # In place, as a state dict has an attribute with versions.
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
        except (AssertionError, OSError) as error:  # a URL that does not lead to a file
            raise WeightsError(
                f"weights {path!r} cannot be fetched ({error}); download the file and set "
                "MODEL.WEIGHTS to its path"
            ) from error
        return extra

    def _load_file(self, f: str) -> dict[str, Any]:
        return read_checkpoint(f)

    def _pretrained_part(self) -> tuple[str, nn.Module, Converter] | None:
        """Name, module and converter of what may be loaded alone; None for strange detectors."""
        found = find_vit(self.model)
        return (*found, convert_vit_checkpoint) if found else None

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        found = self._pretrained_part()
        if found is None:
            return super()._load_model(checkpoint)
        state = checkpoint.pop("model")
        name, part, convert_part = found
        model: nn.Module
        convert: Converter
        around = {key for key in self.model.state_dict() if not key.startswith(name)}
        if any(key.removeprefix("module.") in around for key in state):
            model, convert = self.model, fit_detector_checkpoint
        elif self._plain_vit:
            model, convert = part, convert_part
        else:
            raise WeightsError(
                "the weights have no key of this detector's heads: they are a backbone, or another "
                "model; set MODEL.WEIGHTS to a trained detector, such as OUTPUT_DIR/model_final.pth"
            )
        converted, report = fit_checkpoint(convert, state, model, self._allow_partial)
        model.load_state_dict(converted, strict=False)
        self.logger.info("Weights: %s", "; ".join(report.lines(brief=True)))
        return None


def load_weights(
    checkpointer: type[StrictCheckpointer], model: nn.Module, weights: str
) -> nn.Module:
    """A detector with all of its weights, in evaluation mode.

    Raises:
        WeightsError: they are missing, unreadable, or not of the whole detector.
    """
    checkpointer(model, plain_vit=False).load(weights, checkpointables=[])
    return model.eval()
