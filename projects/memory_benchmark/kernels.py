"""Attention with relative positions, every way to compute it: time, memory, error of each.

The sizes are those of ViT-B's global and windowed blocks. The ways take turns; each is compared
with the stock formula, in time by the median over the turns of a turn's ratio, in value and
gradients by the largest deviation from float64's. Writes kernels-<device>.json and the table in
README.md here. flex_attention, which needs a compiled kernel to be fair, is measured on a GPU.

    python -m projects.memory_benchmark.kernels
    python -m projects.memory_benchmark.kernels --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dr2net_d2.commands import fill_page, markdown_table
from dr2net_d2.core.attention_kernels import KERNELS, choose_kernel
from dr2net_d2.core.memory import count_saved_bytes, peak_tensor_bytes
from dr2net_d2.fidelity.__main__ import surroundings
from projects.memory_benchmark.measurements import HERE, NOT_MEASURED, hardware
from projects.memory_benchmark.store import step_seconds

STOCK = "matrix"
PARTS = ("forward_seconds", "backward_seconds")
HEADS, HEAD_DIM = 12, 64


class Shape(NamedTuple):
    """A block's input: windows or images, and tokens on each axis of one."""

    name: str
    batch: int
    side: int


SHAPES = {
    "cpu": (
        Shape("global, 512 px", 1, 32),
        Shape("global, 768 px", 1, 48),
        Shape("global, 1024 px", 1, 64),
        Shape("windows, 1024 px", 25, 14),
    ),
    "cuda": (
        Shape("global, 1024 px", 1, 64),
        Shape("global, 1536 px", 1, 96),
        Shape("global, 2048 px", 1, 128),
        Shape("windows, 1024 px", 25, 14),
        Shape("windows, 2048 px", 100, 14),
    ),
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flexible_attention(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``flex_attention`` with the position logits, computed beforehand, looked up in its scores."""
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
    width = len(columns)
    on_row = torch.einsum("bnywd,ykd->bnywk", q, rows).flatten(2, 3)
    on_column = torch.einsum("bnywd,wkd->bnywk", q, columns).flatten(2, 3)

    def with_positions(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = key // width, key % width
        return score + on_row[b, n, query, row] + on_column[b, n, query, column]

    attention = _compiled() if qkv.is_cuda else flex_attention
    out: Any = attention(*(t.flatten(2, 3) for t in (q, k, v)), score_mod=with_positions)
    return out.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def candidates(device: torch.device) -> dict[str, Kernel]:
    return KERNELS | ({"flex": flexible_attention} if device.type == "cuda" else {})


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """qkv, rows, columns, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    b, side = shape.batch, shape.side
    sizes = [(b, side, side, 3, HEADS, HEAD_DIM), (side, side, HEAD_DIM), (side, side, HEAD_DIM)]
    sizes.append((b, side, side, HEADS * HEAD_DIM))
    scales = (1, 0.1, 0.1, 1)
    made = [torch.randn(s, generator=generator) * by for s, by in zip(sizes, scales, strict=True)]
    return [tensor.to(device, dtype) for tensor in made]


def differentiate(kernel: Kernel, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Result and gradients of qkv, rows and columns; seconds of forward and backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    times = [_now(inputs[0])]
    out = kernel(*leaves)
    times.append(_now(inputs[0]))
    gradients = torch.autograd.grad(out, leaves, inputs[3])
    times.append(_now(inputs[0]))
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return [out.detach(), *gradients], seconds


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest deviation of a tensor, relative to its largest element; the worst tensor's."""
    pairs = zip(found, expected, strict=True)
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)


def part_of(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The first image or window and two heads of it: the formula's float64 logits have to fit."""
    qkv, rows, columns, gradient = inputs
    return [qkv[:1, :, :, :, :2], rows, columns, gradient[:1, ..., : 2 * HEAD_DIM]]


def measure(
    shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """One row per kernel; without times where memory did not suffice."""
    inputs = make_inputs(shape, device, dtype)
    chosen = choose_kernel(inputs[0])
    expected, _ = differentiate(KERNELS[STOCK], [t.double() for t in part_of(inputs)])
    rows: dict[str, dict[str, Any]] = {}
    ways = candidates(device)
    for name, kernel in ways.items():
        rows[name] = {
            **shape._asdict(),
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": name,
            "chosen": name == chosen,
            "forward_seconds": [],
            "backward_seconds": [],
        }
        try:
            rows[name] |= examine(kernel, inputs, expected)
        except torch.cuda.OutOfMemoryError:
            del rows[name]["chosen"]
    for _ in range(rounds):
        for name, row in rows.items():
            if "peak_bytes" in row:
                _, seconds = differentiate(ways[name], inputs)
                for part, spent in zip(PARTS, seconds, strict=True):
                    row[part].append(round(spent, 6))
    return list(rows.values())


def examine(kernel: Kernel, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, Any]:
    """Error, bytes saved for the backward, peak of forward and backward beyond the inputs."""
    found, _ = differentiate(kernel, part_of(inputs))
    with count_saved_bytes() as saved:
        kernel(*(tensor.detach().requires_grad_() for tensor in inputs[:3]))
    with peak_tensor_bytes() as live:
        differentiate(kernel, inputs)
    return {
        "error": error(found, expected),
        "saved_bytes": saved.total,
        "peak_bytes": live.peak,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per shape, dtype and kernel; the chosen ones in bold."""
    lines = [["block", "kernel", "forward + backward, ms", "of matrix", "GB saved / peak", "error"]]
    for row in rows:
        line = [f"{row['name']}, {row['dtype']}", row["kernel"]]
        if "peak_bytes" not in row:
            lines.append([*line, "out of memory", "-", "-", "-"])
            continue
        (stock,) = (
            step_seconds(other)
            for other in rows
            if (other["name"], other["dtype"], other["kernel"])
            == (row["name"], row["dtype"], STOCK)
        )
        ratios = [one / two for one, two in zip(step_seconds(row), stock, strict=False)]
        forward, backward = (1e3 * statistics.median(row[part]) for part in PARTS)
        lines.append(
            [
                line[0],
                f"**{line[1]}**" if row["chosen"] else line[1],
                f"{_three_digits(forward)} + {_three_digits(backward)}",
                f"{statistics.median(ratios):.2f} x" if ratios else "-",
                f"{row['saved_bytes'] / 1e9:.3f} / {row['peak_bytes'] / 1e9:.3f}",
                f"{row['error']:.0e}",
            ]
        )
    return markdown_table(lines)


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def write_tables(folder: Path) -> None:
    """Write the tables of both devices into the folder's README.md."""
    tables = {}
    for file, device in (("kernels-cpu.json", "CPU"), ("kernels-cuda.json", "GPU")):
        tables[f"kernels {device}"] = f"{device}: {NOT_MEASURED}."
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text())
            where = hardware(content["setting"], device)
            tables[f"kernels {device}"] = f"{where}.\n\n{table(content['rows'])}"
    fill_page(folder / "README.md", tables)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each way")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("kernels.py: error: --device is cuda, but there is no GPU; use cpu", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    content: dict[str, Any] = {"setting": surroundings(device), "rows": []}
    for dtype, shape in itertools.product(DTYPES[args.device], SHAPES[args.device]):
        print(f"{shape.name}, {dtype}", flush=True)
        content["rows"] += measure(shape, device, dtype, args.rounds)
    (HERE / f"kernels-{args.device}.json").write_text(json.dumps(content, indent=1) + "\n")
    write_tables(HERE)
    print(f"wrote kernels-{args.device}.json and the table in {HERE / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
