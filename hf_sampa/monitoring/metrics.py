"""What the steps since the last log line saw, and how long they took."""

from __future__ import annotations

import math
import time

from ..engine import StepReport


LOGGED = ("perturbed_loss", "sharpness", "ascent_grad_norm", "ascent_cosine")


class RunningMeans:
    """Means of a step's numbers over the steps since they were last taken; skipped steps are counted, not averaged.

    A number that is not finite, because a step does not have it, does not count."""

    def __init__(self):
        self.sums, self.steps = dict.fromkeys(LOGGED, 0.0), dict.fromkeys(LOGGED, 0)
        self.skipped_steps = 0

    def add(self, report: StepReport, skipped_steps: int) -> None:
        """Add one step; `skipped_steps` counts those of the whole run."""
        self.skipped_steps = skipped_steps
        if report.skipped:
            return
        for name in LOGGED:
            if math.isfinite(value := getattr(report, name)):
                self.sums[name] += value
                self.steps[name] += 1

    def means(self) -> dict[str, float]:
        """By name; those that there are."""
        return {name: self.sums[name] / steps for name, steps in self.steps.items() if steps}

    def take(self) -> dict[str, float]:
        """Means by name, and the number of skipped steps where there are any; starts anew."""
        means = self.means()
        if self.skipped_steps:
            means["skipped_steps"] = self.skipped_steps
        self.sums, self.steps = dict.fromkeys(LOGGED, 0.0), dict.fromkeys(LOGGED, 0)
        return means

    def state_dict(self) -> dict:
        """What `load_state_dict` takes up; plain values."""
        return {"sums": self.sums, "steps": self.steps, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.sums, self.steps = dict(state["sums"]), state["steps"]
        if not isinstance(self.steps, dict):  # one number for all, in checkpoints from before variants
            self.steps = dict.fromkeys(LOGGED, self.steps)
        self.skipped_steps = state["skipped_steps"]


class StepClock:
    """Measures how long steps take, from the batch to the update: without evaluation, saving and callbacks.

    Attributes:
        seconds: of all steps of this call of ``train`` together.
        steps: how many.
    """

    def __init__(self):
        self.seconds, self.steps, self._began = 0.0, 0, 0.0

    @property
    def mean(self) -> float | None:
        """Seconds per step; None before the first."""
        return self.seconds / self.steps if self.steps else None

    def start(self) -> None:
        """A step begins, after all callbacks."""
        self._began = time.perf_counter()

    def stop(self, *_) -> None:
        """The base optimizer's step is over; takes what its hooks are given."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
