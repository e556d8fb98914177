"""Gradient error and memory over coefficients and depth; writes results.json, tables, pictures.

One row of results.json per arm and finished pair of coefficients; what is there is skipped.

    python -m projects.fidelity.measure
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dr2net_d2.commands import fill_page, load_config, markdown_table
from dr2net_d2.core import CoefficientSchedule, Dr2NetViT
from dr2net_d2.data import load_coco, resolve_dataset
from dr2net_d2.fidelity.__main__ import build_vit, load_image, surroundings
from dr2net_d2.fidelity.gradients import choose_reference, format_error, measure, schedule_pairs
from dr2net_d2.fidelity.picture import draw_fidelity
from projects.fidelity.limits import table as limits_table
from projects.fidelity.step_time import table as time_table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
SEED = 0
DEPTHS = (12, 24, 32)
BETAS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 1)
# The literature starts at alpha = 1 with a small beta.
GRID = [*((1 - beta, beta) for beta in BETAS), (1.0, 1 / 8)]
DEFAULT_SCHEDULE = schedule_pairs(CoefficientSchedule(), 1000)
THINNED_SCHEDULE = schedule_pairs(CoefficientSchedule(), 1000, maximum=5)

Model = Callable[[], tuple[Dr2NetViT, Tensor]]


def random_vit(side: int, **arguments: Any) -> tuple[Dr2NetViT, Tensor]:
    """A ViT with random weights, its relative positions too, and a noise image of ``side`` px."""
    torch.manual_seed(SEED)
    vit = Dr2NetViT(
        img_size=side,
        rel_pos_zero_init=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **arguments,
    )
    return vit.eval(), torch.randn(1, 3, side, side)


def vitdet(side: int, embed_dim: int, depth: int, num_heads: int) -> tuple[Dr2NetViT, Tensor]:
    """ViTDet's backbone: windows of 14 tokens but in four blocks, relative positions."""
    last_of_quarter = range(depth // 4 - 1, depth, depth // 4)
    return random_vit(
        side,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        use_rel_pos=True,
        window_size=14,
        window_block_indexes=[i for i in range(depth) if i not in last_of_quarter],
    )


def micro_vit() -> tuple[Dr2NetViT, Tensor]:
    """The quickstart's pretrained ViT, and an image that it is finetuned for."""
    cfg = load_config(str(ROOT / "configs" / "quickstart.yaml"), [], "torchvision")
    json_file, image_root = resolve_dataset("small_digits_val")
    file = load_coco(json_file, image_root).records[0].file_name
    return build_vit(cfg, SEED), load_image(cfg, cfg.MODEL.VIT.IMG_SIZE, file, SEED)


class Series(NamedTuple):
    """A model with an image, and the coefficients to measure it at."""

    make: Model
    pairs: list[tuple[float, float]]


def by_depth(depth: int) -> str:
    return f"{depth} blocks of 192"


SERIES = {
    **{
        by_depth(depth): Series(
            partial(random_vit, 224, embed_dim=192, depth=depth, num_heads=3), GRID
        )
        for depth in DEPTHS
    },
    "micro ViT, 256 px": Series(micro_vit, DEFAULT_SCHEDULE),
    "ViT-B, 512 px": Series(partial(vitdet, 512, 768, 12, 12), DEFAULT_SCHEDULE),
    "ViT-L, 320 px": Series(partial(vitdet, 320, 1024, 24, 16), THINNED_SCHEDULE),
}
PICTURES = {
    "vit_b_vit_l.png": ("ViT-B, 512 px", "ViT-L, 320 px"),
    "micro_vit.png": ("micro ViT, 256 px",),
}


def error_table(rows: list[dict[str, Any]]) -> str:
    """Gradient errors of the grid, one line per pair of coefficients."""
    arms = ("exact", "float reversible", "plain")
    header = ["α", "β", *(f"{arm}, {depth}" for arm in arms for depth in DEPTHS)]
    lines = [
        [f"{a:.4g}", f"{b:.4g}"]
        + [
            format_error(find(rows, by_depth(depth), a, b, arm)["gradient_error"])
            for arm in arms
            for depth in DEPTHS
        ]
        for a, b in GRID
    ]
    return markdown_table([header, *lines])


def saved_table(rows: list[dict[str, Any]]) -> str:
    """Saved megabytes of the grid, one line per pair of coefficients."""
    arms = ("exact", "checkpointing")
    header = ["α", "β", *(f"{arm}, {depth}" for arm in arms for depth in DEPTHS)]
    lines = [
        [f"{a:.4g}", f"{b:.4g}"]
        + [
            f"{find(rows, by_depth(depth), a, b, arm)['saved_bytes'] / 1e6:.2f}"
            for arm in arms
            for depth in DEPTHS
        ]
        for a, b in GRID
    ]
    return markdown_table([header, *lines])


def model_table(rows: list[dict[str, Any]]) -> str:
    """The three ViTs over the schedule: ranges of errors, highest bytes."""
    arms = ("exact", "float reversible", "checkpointing", "plain")
    lines = [["ViT", "arithmetic", "gradient error, β 1/16 → 1/2", "saved MB", "peak MB"]]
    for names in PICTURES.values():
        for name in names:
            for arm in arms:
                found = [r for r in rows if r["series"] == name and r["arm"] == arm]
                first, last = (format_error(found[i]["gradient_error"]) for i in (0, -1))
                sizes = (max(r[f"{key}_bytes"] for r in found) / 1e6 for key in ("saved", "peak"))
                lines.append([name, arm, f"{first} → {last}", *(f"{s:.1f}" for s in sizes)])
    return markdown_table(lines)


def property_table(found: dict[str, Any]) -> str:
    """Quantiles of error ratios in the property suite, a line per dtype."""
    quantiles = found["error_ratio_quantiles"]
    levels = list(next(iter(quantiles.values())))
    header = ["dtype", "stacks", *("worst" if level == "1.0" else level for level in levels)]
    lines = [
        [dtype, str(found["counts"][dtype]), *(f"{ratios[level]:.2f}" for level in levels)]
        for dtype, ratios in quantiles.items()
    ]
    return markdown_table([header, *lines])


def find(rows: list[dict[str, Any]], series: str, a: float, b: float, arm: str) -> dict[str, Any]:
    (row,) = (
        r for r in rows
        if (r["series"], r["alpha"], r["beta"], r["arm"]) == (series, a, b, arm)
    )  # fmt: skip
    return row


def save(results: dict[str, Any]) -> None:
    partial_file = RESULTS.with_suffix(".json.partial")
    lines = ",\n    ".join(json.dumps(row, allow_nan=False) for row in results["rows"])
    setting = json.dumps(results["setting"], indent=2).replace("\n", "\n  ")
    partial_file.write_text(f'{{\n  "setting": {setting},\n  "rows": [\n    {lines}\n  ]\n}}\n')
    partial_file.replace(RESULTS)


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    results["setting"] = {
        **surroundings(torch.device("cpu")),
        "seed": SEED,
        "weights": {
            name: "dr2net_d2://micro_vit" if series.make is micro_vit else "random"
            for name, series in SERIES.items()
        },
    }
    done = {(row["series"], row["alpha"], row["beta"]) for row in results["rows"]}
    for name, series in SERIES.items():
        missing = [pair for pair in series.pairs if (name, *pair) not in done]
        if not missing:
            continue
        vit, image = series.make()
        reference = choose_reference(vit, image)
        for alpha, beta in missing:
            rows = measure(vit, image, alpha, beta, reference=reference.dtype, seed=SEED)
            common = {"series": name, "reference": reference.name}
            results["rows"] += [{**common, **row} for row in rows]
            save(results)
            print(name, f"alpha {alpha:g} beta {beta:g}", *(r["gradient_error"] for r in rows))
    rows = results["rows"]
    tables = {
        "errors": error_table(rows),
        "saved": saved_table(rows),
        "models": model_table(rows),
        "properties": property_table(json.loads((HERE / "properties.json").read_text())),
        "limits": limits_table(json.loads((HERE / "limits.json").read_text())),
        "time": time_table(json.loads((HERE / "step_time.json").read_text())),
    }
    fill_page(HERE / "README.md", tables)
    for file, names in PICTURES.items():
        chosen = {name: [row for row in rows if row["series"] == name] for name in names}
        draw_fidelity(chosen, "float64", HERE / file)


if __name__ == "__main__":
    main()
