"""What would make a run fit that does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .memory import Run


MOST_DEVICES = 4096
LORA = ("--trainable 1% (LoRA)", 0.01)


def what_would_fit(run: Run, devices: int, fits: Callable[[Run, int], bool]) -> list[str]:
    """Options, each after which it fits; where no single one will do, several together.

    Args:
        run: as it was asked for.
        devices: how many there are.
        fits: whether a run does, on a number of devices.
    """
    lighter, lora = _for_activations(run), _lora(run)
    single = [name for name, changes in (lighter | lora).items() if fits(replace(run, **changes), devices)]
    if single := [*single, *_more_devices(run, devices, fits)]:
        return single
    together = [*lighter]
    lightest = replace(run, **{field: value for changes in lighter.values() for field, value in changes.items()})
    if fits(lightest, devices):
        return [" ".join(together)]
    last = [name for name, changes in lora.items() if fits(replace(lightest, **changes), devices)]
    return [" ".join([*together, each]) for each in (*last, *_more_devices(lightest, devices, fits))]


def _for_activations(run: Run) -> dict[str, dict[str, Any]]:
    """What makes them fewer, where they are known."""
    changes = {
        "--bf16": {"bf16": True},
        "--gradient-checkpointing": {"checkpointing": True},
        "--batch 1": {"batch": 1},
    }
    return {name: change for name, change in changes.items() if run.size.shape and replace(run, **change) != run}


def _lora(run: Run) -> dict[str, dict[str, Any]]:
    name, part = LORA
    return {name: {"trained": round(part * run.size.weights)}} if run.trained == run.size.weights else {}


def _more_devices(run: Run, devices: int, fits: Callable[[Run, int], bool]) -> list[str]:
    """The first multiple by a power of two."""
    while (devices := 2 * devices) <= MOST_DEVICES:
        if fits(run, devices):
            return [f"--devices {devices}"]
    return []
