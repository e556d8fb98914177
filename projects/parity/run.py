"""Runs what results.jsonl lacks: learning rates are tuned first, then every arm with every seed.

A row is added when a run ends, so it may be stopped at any time and started again; a run that was
cut off begins anew.

    python -m projects.parity.run [--jobs 2] [--seeds 3] [--minutes 90] [ARM ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version

import torch
from tqdm import tqdm

from dr2net_d2.errors import ConfigError, run_command
from projects.parity import arms
from projects.parity.finetune import FINAL, TUNING, Run, finetune
from projects.parity.results import RESULTS, Row, read_results, tuned

FIRST_RATES = (1e-3, 2e-3, 4e-3)
LOWEST_RATE, HIGHEST_RATE = 2.5e-4, 1.6e-2
TUNING_SEED = 100


def rates_to_try(found: dict[float, float]) -> list[float]:
    """Learning rates that tuning still lacks: the first three, then beyond a best at the end."""
    missing = [rate for rate in FIRST_RATES if rate not in found]
    if missing:
        return missing
    best = best_rate(found)
    further = {min(found): best / 2, max(found): best * 2}.get(best)
    if further is None or not LOWEST_RATE <= further <= HIGHEST_RATE:
        return []
    return [further]


def best_rate(found: dict[float, float]) -> float:
    return max(found, key=lambda rate: found[rate])


def outstanding(
    rows: Sequence[Row], chosen: Sequence[arms.Arm], seeds: Iterable[int]
) -> Iterator[Run]:
    """The runs that can be started now, those that others wait for first."""
    done = {Run(row["stage"], row["arm"], row["rate"], row["seed"]) for row in rows}
    seeds = list(seeds)
    rates: dict[str, float] = {}
    for arm in chosen:
        found = tuned(rows, arm)
        to_try = rates_to_try(found)
        for rate in to_try:
            yield Run(TUNING, arm.rate_of or arm.name, rate, TUNING_SEED)
        if not to_try:
            rates[arm.name] = best_rate(found)
    for seed in seeds:
        for arm in chosen:
            if arm.name in rates:
                run = Run(FINAL, arm.name, rates[arm.name], seed)
                if run not in done:
                    yield run


def setting() -> dict[str, str]:
    return {"processor": platform.machine(), "torch": version("torch")}


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_outstanding(args: argparse.Namespace) -> None:
    """Fill results.jsonl for ``args.arms``, or for everything, with a bar of progress."""
    if unknown := sorted(set(args.arms) - set(arms.EVERYTHING)):
        known = ", ".join(arms.EVERYTHING)
        raise ConfigError(f"{unknown[0]!r} is no arm; use some of {known}")
    chosen = [arm for name, arm in arms.EVERYTHING.items() if not args.arms or name in args.arms]
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = time.monotonic() + 60 * args.minutes
    rows = read_results()
    running: dict[Future[Row], Run] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, _one_thread) as pool, tqdm() as bar:
        while True:
            waiting = [
                run
                for run in dict.fromkeys(outstanding(rows, chosen, range(1, args.seeds + 1)))
                if run not in running.values()
            ]
            bar.total = bar.n + len(waiting) + len(running)
            for run in waiting[: args.jobs - len(running)]:
                if time.monotonic() < deadline:
                    running[pool.submit(finetune, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                row = {**future.result(), **setting()}
                rows.append(row)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                bar.update()
                bar.write(f"{run}: {row['status']}, AP {row.get('AP')}, {row['minutes']} min")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", nargs="*", metavar="ARM", help="default: all, then all variants")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this for every arm")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none after")
    return run_command("run.py", run_outstanding, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
