"""Memory and time of a training step, side by side: stock ViTDet, checkpointing, frozen, Dr2Net.

All arms have the same weights, images and random numbers. Memory is measured arm by arm; then they
take turns, so that a noisy machine slows all of them alike. Every measurement is written at once:
an interrupted run goes on where it stopped, and what is there is skipped. Needs Detectron2.

    python -m projects.memory_benchmark.measure --preset cpu
    python -m projects.memory_benchmark.measure --preset gpu --device cuda --time-limit 540
    python -m projects.memory_benchmark.measure --models ti b --sizes 512 1024 --scope vit
    python -m projects.memory_benchmark.measure --models ti --arms dr2net-stock-heads \\
        dr2net-lean-pyramid dr2net-lean-rpn dr2net-lean-roi dr2net-exact --output lean-cpu.json
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dr2net_d2.errors import ConfigError, UserError
from dr2net_d2.fidelity.__main__ import surroundings
from projects.memory_benchmark.store import (
    ARMS,
    DEPTHS,
    FAILED,
    LEAN_ARMS,
    MEASURED,
    OUT_OF_MEMORY,
    PRECISIONS,
    SCOPES,
    Results,
    Work,
    step_seconds,
    turns,
)

if importlib.util.find_spec("detectron2"):
    import detectron2

    from projects.memory_benchmark import arms as networks

HERE = Path(__file__).parent
AXES = ("scope", "models", "depths", "sizes", "batches", "precisions")
ONE: dict[str, list[Any]] = {
    "scope": ["detector"],
    "models": ["b"],
    "depths": [None],
    "sizes": [1024],
    "batches": [1],
    "precisions": ["fp32"],
}
"""What a preset's part, or a command line, leaves out."""

PRESETS: dict[str, list[dict[str, list[Any]]]] = {
    # In the order of what is missed most if time runs out.
    "cpu": [
        {"models": ["ti"], "sizes": [512, 768, 1024]},
        {"models": ["b"]},
        {"models": ["ti"], "depths": [6, 12, 24, 48], "sizes": [512]},
        {"models": ["ti"], "scope": ["vit"], "sizes": [512, 768, 1024]},
        {"models": ["s"], "sizes": [512, 1024]},
        {"models": ["ti"], "sizes": [512], "batches": [2, 4]},
    ],
    "gpu": [
        {"precisions": ["bf16"], "sizes": [1024, 512, 1536, 2048, 3072]},
        {"precisions": ["fp32"]},
        {"precisions": ["bf16"], "batches": [2, 4]},
        {"precisions": ["bf16"], "models": ["l"], "sizes": [1024, 1536, 2048]},
        {"precisions": ["bf16"], "models": ["h"]},
        {"precisions": ["bf16"], "depths": [6, 12, 24, 48]},
        {"precisions": ["bf16"], "models": ["b", "l", "h"], "scope": ["vit"]},
        {"precisions": ["bf16"], "models": ["ti", "s"], "sizes": [1024, 2048]},
    ],
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="a list of configurations")
    axes = parser.add_argument_group(
        "configurations", "all combinations; or in place of a preset's"
    )
    axes.add_argument("--scope", nargs="+", choices=SCOPES, help="whole detector, or its ViT alone")
    axes.add_argument("--models", nargs="+", choices=DEPTHS)
    axes.add_argument("--depths", nargs="+", type=int, metavar="N", help="blocks, 4 to 48")
    axes.add_argument("--sizes", nargs="+", type=int, metavar="PX", help="sides of square images")
    axes.add_argument("--batches", nargs="+", type=int, metavar="N", help="images a step")
    axes.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="bf16 is autocast")
    parser.add_argument("--arms", nargs="+", choices={**ARMS, **LEAN_ARMS}, default=list(ARMS))
    parser.add_argument("--objects", type=int, default=20, metavar="N", help="per image")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="timed turns of each arm"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="results-<device>.json here")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="S", help="stop after so long"
    )
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> list[Work]:
    """The configurations that the arguments ask for, each once.

    Raises:
        ConfigError: a number that cannot be.
    """
    limits = {
        "sizes": (64, 8192, 32),
        "depths": (4, 48, 1),
        "batches": (1, 64, 1),
        "objects": (1, 1000, 1),
        "rounds": (0, 1000, 1),
        "seed": (0, 2**32 - 1, 1),
    }
    for name, (low, high, multiple) in limits.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not (low <= value <= high and value % multiple == 0):
                of = f"multiples of {multiple} " if multiple > 1 else ""
                raise ConfigError(f"--{name} has {value}; use {of}from {low} to {high}")
    asked = {axis: values for axis in AXES if (values := getattr(args, axis))}
    works = [
        Work(
            scope,
            model,
            None if depth == DEPTHS[model] else depth,
            size,
            batch,
            precision,
            args.objects,
            args.seed,
        )
        for part in (PRESETS[args.preset] if args.preset else [{}])
        for scope, model, depth, size, batch, precision in itertools.product(
            *({**ONE, **part, **asked}[axis] for axis in AXES)
        )
    ]
    return list(dict.fromkeys(works))


class Bench:
    """Measures configurations one after another into a file.

    Args:
        results: where to.
        arms: of ``store.ARMS`` or ``store.LEAN_ARMS``.
        device: where on.
        rounds: timed turns of each arm.
        until: a ``time.perf_counter`` after which no measurement starts.
    """

    def __init__(
        self,
        results: Results,
        arms: Sequence[str],
        device: torch.device,
        rounds: int,
        until: float = float("inf"),
    ) -> None:
        self.results, self.arms, self.device = results, arms, device
        self.rounds, self.until = rounds, until
        self._key: Any = None
        self._networks: dict[str, networks.Network] = {}
        self._embed_dim = 0
        self._warm: set[str] = set()

    def run(self, works: Iterable[Work]) -> None:
        """Measure whatever is missing in the file.

        Raises:
            TimeoutError: the time is up.
        """
        works = list(works)
        for number, work in enumerate(works, 1):
            arms = [arm for arm in self.arms if (work.scope, arm) != ("vit", "frozen")]
            if missing := [arm for arm in arms if self._is_missing(work, arm)]:
                say(f"{number} of {len(works)}: {work}")
                self._measure(work, missing)

    def _is_missing(self, work: Work, arm: str) -> bool:
        row = self.results.find(work, arm)
        if row is None or row["status"] == FAILED:
            return True
        return row["status"] == MEASURED and turns(row) < self.rounds

    def _measure(self, work: Work, missing: Sequence[str]) -> None:
        self._prepare(work)
        inputs, gradient = networks.make_inputs(work, self._embed_dim, self.device)
        self._warm = set()
        for arm in missing:
            row = self.results.find(work, arm)
            if row is None or row["status"] == FAILED:
                self._check_time()
                started = time.perf_counter()
                row = self._guarded(work, arm, self._memory, inputs, gradient)
                seconds = time.perf_counter() - started
                say(f"    {ARMS.get(arm, arm)}: {describe(row)} ({seconds:.0f} s)")
        for turn in range(self.rounds):
            timed = []
            for arm in missing:
                row = self.results.find(work, arm)
                if row and row["status"] == MEASURED and turns(row) <= turn:
                    self._check_time()
                    row = self._guarded(work, arm, self._time, inputs, gradient)
                    timed.append(f"{ARMS.get(arm, arm)} {describe(row)}")
            if timed:
                say(f"    turn {turn + 1} of {self.rounds}: {', '.join(timed)}")

    def _guarded(self, work: Work, arm: str, measurement: Any, *given: Any) -> dict[str, Any]:
        """The arm's row after a measurement; running out of memory is a result, too."""
        failure = None
        try:
            values = measurement(work, arm, *given)
        except (RuntimeError, MemoryError, ArithmeticError) as error:
            message = " ".join(str(error).split())
            short = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            failure = (OUT_OF_MEMORY if short or "allocate memory" in message else FAILED, message)
        if failure:  # outside of the handler, whose traceback holds the tensors
            networks.free_memory(self.device)
            values = dict(zip(("status", "message"), failure, strict=True))
        return self.results.put(work, arm, **values)

    def _memory(self, work: Work, arm: str, inputs: Any, gradient: Any) -> dict[str, Any]:
        self._warm.add(arm)
        found = networks.measure_memory(self._networks[arm], inputs, gradient, work)
        networks.free_memory(self.device)
        return {"status": MEASURED, **found}

    def _time(self, work: Work, arm: str, inputs: Any, gradient: Any) -> dict[str, Any]:
        network, row = self._networks[arm], self.results.find(work, arm)
        assert row is not None
        with networks.gradients(network):
            if arm not in self._warm:  # of an interrupted run
                networks.take_step(network, inputs, gradient, work)
                self._warm.add(arm)
            step = networks.take_step(network, inputs, gradient, work)
        return {
            key: [*row.get(key, ()), round(getattr(step, key), 5)]
            for key in ("forward_seconds", "backward_seconds")
        }

    def _prepare(self, work: Work) -> None:
        """Build the networks, unless the last configuration had the same."""
        key = (work.scope, work.model, work.depth, work.seed)
        if key == self._key:
            return
        self._check_time()
        self._key, self._networks = None, {}
        networks.free_memory(self.device)
        cfg = networks.load_config(work.model, work.depth)
        self._embed_dim = cfg.MODEL.VIT.EMBED_DIM
        self._networks = networks.build_networks(cfg, work.scope, self.arms, self.device, work.seed)
        self._key = key

    def _check_time(self) -> None:
        if time.perf_counter() > self.until:
            raise TimeoutError


def describe(row: dict[str, Any]) -> str:
    """What was measured last, for a line of progress."""
    if row["status"] != MEASURED:
        return f"{row['status']}: {row['message'][:200]}"
    if turns(row):
        return f"{step_seconds(row)[-1]:.3g} s"
    return f"saved {row['saved_bytes'] / 1e9:.3f} GB, peak {row['peak_bytes'] / 1e9:.3f} GB"


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments describe; returns the exit code.

    Raises:
        UserError: the arguments, the device or the output file cannot be used.
    """
    if not importlib.util.find_spec("detectron2"):
        raise ConfigError("Detectron2 is not installed, whose ViTDet is compared; see README.md")
    works = plan(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but no CUDA GPU can be used here; use cpu")
    device = torch.device(args.device)
    # "fp32" is to mean that on a GPU's tensor cores too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    path = args.output or HERE / f"results-{args.device}.json"
    if not path.parent.is_dir():
        raise ConfigError(f"--output is {path}, but there is no folder {path.parent}; make it")
    setting = {**surroundings(device), "detectron2": detectron2.__version__}
    bench = Bench(
        Results(path, setting),
        args.arms,
        device,
        args.rounds,
        time.perf_counter() + args.time_limit,
    )
    try:
        bench.run(works)
    except TimeoutError:
        say(f"the time is up; the same command goes on from {path}")
        return 0
    failed = [row for row in bench.results.rows if row["status"] == FAILED]
    say(f"all {len(works)} configurations are in {path}, {len(failed)} rows of it failed")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv))
    except UserError as error:
        print(f"measure.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
