"""Running a residual function again exactly as it ran before: its random numbers, its autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def rng_state(device: torch.device) -> tuple[Tensor, ...]:
    """States of the generators that a function on ``device`` draws from."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def set_rng_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def replayed_rng(device: torch.device, states: tuple[Tensor, ...]) -> Iterator[None]:
    """Draw from ``states`` inside, leaving the global streams as they were (empty: do nothing)."""
    if not states:
        yield
        return
    outer = rng_state(device)
    set_rng_state(device, states)
    try:
        yield
    finally:
        set_rng_state(device, outer)


class AutocastState:
    """The autocast state of a device at construction, to be entered again later.

    Entered without the weight cache: a copy of a weight cached by a forward without gradients would
    cut that weight off in the backward, and the cache holds 2 bytes a parameter until the region
    ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    def __call__(self) -> torch.autocast:
        return torch.autocast(
            self._device_type, dtype=self._dtype, enabled=self._enabled, cache_enabled=False
        )
