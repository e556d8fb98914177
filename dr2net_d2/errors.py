"""Errors that the user can fix: commands print them as one line and exit with code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the input; the message states the value, what is allowed and what to do."""


class ConfigError(UserError):
    """A config file, key or command-line option that cannot be used."""


class DatasetError(UserError):
    """A dataset that is missing, damaged or inconsistent."""


class WeightsError(UserError):
    """A checkpoint that is missing, unreadable or does not fit the model."""


@contextmanager
def config_section(name: str) -> Iterator[None]:
    """Turn a ValueError from objects built of config section ``name`` into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


@contextmanager
def weights_being_read() -> Iterator[None]:
    """Turn a ValueError from ``weights.plain_vit`` into a WeightsError."""
    try:
        yield
    except ValueError as error:
        raise WeightsError(f"the weights cannot be used: {error}") from error


@contextmanager
def detector_being_built() -> Iterator[None]:
    """Turn Detectron2's errors about keys of MODEL that do not fit together into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
        raise ConfigError(
            f"MODEL: the detector cannot be built: {type(error).__name__}: {error}"
        ) from error


def run_command(
    prog: str, run: Callable[[argparse.Namespace], object], args: argparse.Namespace
) -> int:
    """Run a command, logging to stderr.

    Returns:
        The exit code: 0, 2 for a ``UserError``, or 1 for a number that is not finite. The error is
        printed as one line on stderr.
    """
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    try:
        run(args)
    except (UserError, FloatingPointError) as error:
        # An error from a data loader's worker begins with its traceback.
        print(f"{prog}: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0
