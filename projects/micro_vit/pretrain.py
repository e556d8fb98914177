"""Pretrains the micro ViT that the package ships: an ordinary network, timm's, nothing reversible.

The 12 blocks of projects/parity are pretrained by it as well.

Task: on small canvases of SmallDigits, say for every 8 px patch which digit covers its centre, or
none. Only digit samples of the training split are drawn. Writes the weights (float16 safetensors,
timm's names) and a JSON with the figures.

    python -m projects.micro_vit.pretrain
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dr2net_d2.data import SmallDigitsConfig, draw_canvas

HERE = Path(__file__).parent
SIZE, PATCH, NONE = 64, 8, 10
OBJECTS = 7
BATCH = 64
PEAK_LR, WARMUP = 2e-3, 300


def micro_vit(depth: int) -> nn.Module:
    """timm's plain ViT: blocks of 96 channels on 8 x 8 patches of 8 px."""
    return timm.models.VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=96,
        depth=depth,
        num_heads=3,
        num_classes=NONE + 1,
    )


def patch_labels(boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(64,) class of the smallest box over each patch centre, NONE outside all boxes."""
    centres = (np.arange(SIZE // PATCH) + 0.5) * PATCH
    x, y = (axis.ravel() for axis in np.meshgrid(centres, centres))
    target = np.full(x.shape, NONE)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for i in np.argsort(-areas):
        x0, y0, x1, y1 = boxes[i]
        target[(x >= x0) & (x < x1) & (y >= y0) & (y < y1)] = labels[i]
    return target


def canvases(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 64, 64) uint8 and (count, 64) int64."""
    config = SmallDigitsConfig(split, num_images=count, size=SIZE, objects=OBJECTS, seed=seed)
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    targets = np.empty((count, (SIZE // PATCH) ** 2), np.int64)
    for index in tqdm(range(count), desc=f"drawing {split}"):
        image, boxes, labels, _ = draw_canvas(config, index)
        images[index] = image.transpose(2, 0, 1)
        targets[index] = patch_labels(boxes, labels)
    return torch.from_numpy(images), torch.from_numpy(targets)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 64, 11) from uint8 canvases; the class token's row is left out."""
    tokens = model.forward_features((images.float() - 127.5) / 64)
    return model.head(tokens[:, 1:])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, float]:
    """Fractions right of all patches, and of those that a digit covers."""
    model.eval()
    predicted = torch.cat([logits(model, part).argmax(-1) for part in images.split(BATCH)])
    model.train()
    right, covered = predicted == targets, targets != NONE
    return {
        "patches": right.float().mean().item(),
        "digit_patches": right[covered].float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    weights_file = HERE.parents[1] / "dr2net_d2/weights/pretrained/micro_vit.safetensors"
    parser.add_argument("--output", type=Path, default=weights_file, help="the weights")
    parser.add_argument("--result", type=Path, default=HERE / "result.json", help="the figures")
    parser.add_argument("--depth", type=int, default=8, help="number of blocks")
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--canvases", type=int, default=20000, help="training canvases drawn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    # Seeds other than the detection datasets' (0), so that no canvas of theirs is drawn here.
    images, targets = canvases("train", args.canvases, seed=args.seed + 1000)
    val_images, val_targets = canvases("val", 1000, seed=args.seed + 1000)
    model = micro_vit(args.depth)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=PEAK_LR
    )
    weights = torch.full((NONE + 1,), 1.0)
    weights[NONE] = 0.3
    started = time.time()
    bar = tqdm(range(args.iterations), desc="training")
    for iteration in bar:
        progress = iteration / args.iterations
        lr = PEAK_LR * min(iteration / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(
            logits(model, images[rows]).flatten(0, 1), targets[rows].flatten(), weights
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (iteration + 1) % 500 == 0:
            figures = accuracy(model, val_images, val_targets)
            bar.write(f"{iteration + 1}: loss {loss.item():.3f} {figures}")

    model.half().float()
    result = {
        "depth": args.depth,
        **accuracy(model, val_images, val_targets),
        "iterations": args.iterations,
        "images_seen": args.iterations * BATCH,
        "minutes": round((time.time() - started) / 60, 1),
        "canvases": args.canvases,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()},
        args.output,
    )
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
