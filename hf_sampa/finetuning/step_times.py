"""How long a step takes, without the start of a run and its evaluations."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Notes when each step of a training ends."""

    reads_model = False

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._ends = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._ends.append(time.perf_counter())

    def metrics(self) -> dict[str, float]:
        """``train_seconds_per_step``: the median time from the end of one step to that of the next; nothing of fewer than two."""
        times = [after - before for before, after in pairwise(self._ends)]
        return {"train_seconds_per_step": round(median(times), 4)} if times else {}
