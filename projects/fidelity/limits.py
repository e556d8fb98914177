"""Where float32's fixed point is less precise than float32: streams of very different sizes.

Twelve ViT blocks at beta 1/2; the error of our gradient over that of plain float32 training, both
against float64, geometric mean over seeds. Writes limits.json.

    python -m projects.fidelity.limits
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dr2net_d2.commands import markdown_table
from dr2net_d2.core import Dr2NetViT
from dr2net_d2.fidelity.__main__ import surroundings
from dr2net_d2.fidelity.gradients import measure

RESULTS = Path(__file__).parent / "limits.json"
SEEDS = range(8)
FACTORS = (1, 10, 100, 1000, 10000)


class Scaled(nn.Module):
    """A ViT block whose residual functions give ``scale`` times their values."""

    branches = 2

    def __init__(self, block: nn.Module, scale: float) -> None:
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.scale * self.block(x, branch=branch)


def errors(seed: int, functions: float = 1.0, channel: float = 1.0) -> tuple[float, float]:
    """Our gradient error, and plain float32's.

    Args:
        seed: of the weights and the image.
        functions: factor of all residual functions.
        channel: factor of one channel of the streams' input.
    """
    torch.manual_seed(seed)
    vit = Dr2NetViT(img_size=64, embed_dim=32, depth=12, num_heads=2, pretrain_img_size=64).eval()
    with torch.no_grad():
        for parameter in vit.blocks.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        vit.patch_embed.proj.weight[0] *= channel
    for index in range(len(vit.blocks)):
        vit.blocks.add_module(str(index), Scaled(vit.blocks[index], functions))
    image = torch.randn(1, 3, 64, 64)
    exact, plain = measure(vit, image, 0.5, 0.5, seed=seed, arms=("exact", "plain"))
    return exact["gradient_error"], plain["gradient_error"]


def table(found: dict[str, Any]) -> str:
    lines = [["factor of", *map(str, FACTORS)]]
    for name, pairs in found["errors"].items():
        lines.append([name, *(f"{exact:.1e} ({exact / plain:.2f})" for exact, plain in pairs)])
    return markdown_table(lines)


def main() -> None:
    cases = {"all functions' values": "functions", "one input channel": "channel"}
    found = {
        name: [
            [statistics.geometric_mean(column) for column in zip(*pairs, strict=True)]
            for factor in FACTORS
            if (pairs := [errors(seed, **{key: float(factor)}) for seed in SEEDS])
        ]
        for name, key in cases.items()
    }
    content = {"setting": surroundings(torch.device("cpu")), "seeds": len(SEEDS), "errors": found}
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
