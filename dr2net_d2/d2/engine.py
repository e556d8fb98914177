"""The Detectron2 engine of ``train_net.py``: check everything, then train or evaluate."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import distributed
from torch.multiprocessing.spawn import ProcessRaisedException

from dr2net_d2.d2.checkpointer import Dr2NetCheckpointer
from dr2net_d2.d2.experiment import Experiment
from dr2net_d2.d2.lazy_experiment import LazyExperiment
from dr2net_d2.d2.trainer import Results
from dr2net_d2.d2.yaml_experiment import YamlExperiment
from dr2net_d2.errors import ConfigError, UserError
from dr2net_d2.evaluation import RESULTS_FILE
from dr2net_d2.training import draw_curves, draw_predictions


def run(args: argparse.Namespace) -> Results:
    """Train and evaluate, or only evaluate, as a config file of either style says.

    Under torchrun this is one of the processes that torchrun has started. Otherwise it starts
    ``num_gpus`` processes of its own.

    Args:
        args: as from Detectron2's ``default_argument_parser``: config_file (.yaml or .py), opts
            (``KEY VALUE`` words; ``key=value`` for .py), eval_only, resume, num_gpus (per machine),
            num_machines, machine_rank, dist_url.

    Returns:
        Detectron2's results, ``{"bbox": {"AP": ...}}``, under the names of the datasets if there
        are several; empty on every machine but the first.

    Raises:
        UserError: the config, a dataset or the path of the weights cannot be used, and nothing has
            been written; or the weights do not fit the model.
        FloatingPointError: the training has diverged; the last checkpoint was written before.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_in_torchrun(args)
    available = torch.cuda.device_count()
    if not 1 <= args.num_gpus <= max(available, 1):
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but this machine has {available} CUDA GPUs; "
            f"use {f'1 to {available}' if available > 1 else '1'} (1 is right for a CPU too; "
            "torchrun starts several processes on one)"
        )
    if args.num_gpus * args.num_machines == 1:
        return _train_or_evaluate(args)
    with multiprocessing.Manager() as manager:
        outcome = manager.dict()
        try:
            launch(
                _work,
                args.num_gpus,
                args.num_machines,
                args.machine_rank,
                args.dist_url,
                args=(args, outcome),
            )
        except ProcessRaisedException:
            if "error" in outcome:
                raise outcome["error"] from None
            raise
        return outcome.get("results", {})


def _run_in_torchrun(args: argparse.Namespace) -> Results:
    if args.num_gpus * args.num_machines != 1:
        raise ConfigError("torchrun decides on processes: leave out --num-gpus and --num-machines")
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return _train_or_evaluate(args)
    finally:
        distributed.destroy_process_group()


def _work(args: argparse.Namespace, outcome: MutableMapping[str, Any]) -> None:
    """Run one of several processes; the results, or the error, are put into ``outcome``."""
    try:
        results = _train_or_evaluate(args)
    except (UserError, FloatingPointError) as error:
        outcome["error"] = error
        raise
    if comm.is_main_process():
        outcome["results"] = results
    if distributed.is_initialized():
        # Threads of the group that outlive this function sometimes abort the process at its exit.
        distributed.destroy_process_group()


def _train_or_evaluate(args: argparse.Namespace) -> Results:
    kind = LazyExperiment if args.config_file.endswith(".py") else YamlExperiment
    experiment: Experiment = kind(args)
    settings = experiment.settings
    try:
        default_setup(experiment.cfg, args)
    except OSError as error:
        raise ConfigError(
            f"the output folder {settings.output_dir!r} cannot be written ({error.strerror}); "
            "choose another"
        ) from error
    logger = setup_logger(settings.output_dir, comm.get_rank(), name="dr2net_d2")
    logger.info("Model:\n%s", experiment.model)
    experiment.warn()
    if args.eval_only:
        checkpointer = Dr2NetCheckpointer(
            experiment.model,
            settings.output_dir,
            allow_partial=settings.allow_partial,
            plain_vit=False,
        )
        checkpointer.resume_or_load(experiment.weights, resume=args.resume)
        results = experiment.evaluate(experiment.model, final=True)
    else:
        trainer = experiment.trainer()
        trainer.resume_or_load(experiment.weights, args.resume)
        results = trainer.train()
    if comm.is_main_process():
        if not args.eval_only:
            draw_curves(settings.output_dir)
        _draw_predictions(settings.output_dir, experiment.test_set())
        # verify_results reads nothing else of a config; it exits where the results differ.
        test = SimpleNamespace(EXPECTED_RESULTS=settings.expected_results)
        verify_results(SimpleNamespace(TEST=test), results)
    return results


def _draw_predictions(output_dir: str, dataset: str | None) -> None:
    """Draw the detections in the results file of the output folder, if there is one."""
    results = Path(output_dir, RESULTS_FILE)
    if dataset is not None and results.is_file():
        metadata = MetadataCatalog.get(dataset)
        picture = Path(output_dir, "predictions.png")
        draw_predictions(metadata.json_file, metadata.get("image_root", ""), results, picture)
