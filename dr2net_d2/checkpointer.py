"""Checkpoints of detectors: written atomically, loaded completely or not at all.

Builds on fvcore's ``Checkpointer``, which Detectron2's derives from, so both engines use it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from dr2net_d2.core.checkpoint import convert_vit_checkpoint
from dr2net_d2.errors import WeightsError
from dr2net_d2.finetuning import non_finite

PACKAGED = "dr2net_d2://"
"""Prefix of MODEL.WEIGHTS for weights that the package ships, such as dr2net_d2://micro_vit."""

DEFAULTED = (
    "pixel_mean",
    "pixel_std",
    "*anchor_generator.cell_anchors*",
    "*.coefficients.*",
    "*.stream_range.*",
)
"""Keys that describe the input or the coefficients; the model has defaults for them."""


def locate_weights(path: str) -> str:
    """The file that MODEL.WEIGHTS names; URLs and "" (random weights) come back as they are.

    Raises:
        WeightsError: there is no such file.
    """
    if path.startswith(PACKAGED):
        name = path.removeprefix(PACKAGED)
        path = str(files("dr2net_d2").joinpath("weights", f"{name}.safetensors"))
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


class StrictCheckpointer(Checkpointer):  # type: ignore[misc]
    """fvcore's checkpointer with atomic writes, and without silent partial loads.

    A checkpoint without a key of the detector is taken for a plain ViT (MAE, timm or Detectron2
    naming, .pth or .safetensors) and converted into the backbone. Anything else must fit the whole
    detector.

    Args:
        allow_partial: patterns of model keys that a detector checkpoint may lack or have in another
            shape, for example ``roi_heads.box_predictor.*`` for other classes.
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
        if not self.save_dir or not self.save_to_disk:
            return
        kwargs.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        self.save_weights(name, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **others: Any) -> None:
        """Write the model, and nothing that a training could be resumed from but ``others``."""
        parameters = dict(self.model.named_parameters())
        if bad := non_finite(parameters):
            raise FloatingPointError(
                f"{bad[0]}, one of {len(bad)} such among {len(parameters)} parameters, is not "
                f"finite after the optimizer's step; {name}.pth has not been written"
            )
        target = Path(self.save_dir, f"{name}.pth")
        partial = target.with_suffix(".pth.partial")
        torch.save({"model": self.model.state_dict(), **others}, partial)
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
        try:
            if f.endswith(".safetensors"):
                return {"model": safetensors.torch.load_file(f)}
            checkpoint = super()._load_file(f)
        except Exception as error:  # whatever the format's reader raises on a damaged file
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"weights {f!r} cannot be read: {reason}") from error
        return checkpoint if "model" in checkpoint else {"model": checkpoint}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        found = find_vit(self.model)
        if found is None:
            return super()._load_model(checkpoint)
        state = checkpoint["model"]
        self._convert_ndarray_to_tensor(state)
        vit_name, vit = found
        if any(key.removeprefix("module.").startswith(vit_name) for key in state):
            self._refuse_partial(state)
            return super()._load_model(checkpoint)
        if not self._plain_vit:
            raise WeightsError(
                "the weights have no key of this detector, so they are a backbone or another "
                "model; set MODEL.WEIGHTS to a trained detector, such as OUTPUT_DIR/model_final.pth"
            )
        converted, report = convert_vit_checkpoint(state, vit)
        _refuse(report.problems(), "fit the ViT; check MODEL.VIT.*")
        self.logger.info("Plain ViT checkpoint: %s", report.summary())
        vit.load_state_dict(converted, strict=False)
        return None

    def _refuse_partial(self, state: dict[str, torch.Tensor]) -> None:
        targets = self.model.state_dict()
        given = {key.removeprefix("module."): tensor.shape for key, tensor in state.items()}
        problems = {
            key: f"{key} is {tuple(given[key])}, the model's {tuple(tensor.shape)}"
            if key in given
            else f"missing {key}"
            for key, tensor in targets.items()
            if given.get(key) != tensor.shape
        }
        problems |= {key: f"unexpected {key}" for key in given if key not in targets}
        optional = (*DEFAULTED, *self._allow_partial)
        _refuse(
            [
                problem
                for key, problem in problems.items()
                if not any(fnmatch.fnmatchcase(key, pattern) for pattern in optional)
            ],
            "fit the detector; allow keys by pattern in MODEL.DR2NET.ALLOW_PARTIAL to finetune "
            "from another detector",
        )


def _refuse(problems: Sequence[str], remedy: str) -> None:
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise WeightsError(f"the weights do not {remedy}: {shown}")
