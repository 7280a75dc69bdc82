"""What can be said of scores: means with intervals, differences to the first method on equal seeds, and over tasks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats


LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """Of `count` values. `deviation` is the sample's; `half` is half of the interval of Student's t, both nan of one value."""

    value: float
    deviation: float
    half: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - self.half, self.value + self.half


def mean(values: Sequence[float]) -> Mean:
    """Raises ValueError of no values."""
    if not values:
        raise ValueError("values: expected at least one, got none.")
    if len(values) == 1:
        return Mean(values[0], math.nan, math.nan, 1)
    deviation = stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    value = fmean(values)
    # Equal gains and losses leave nothing but rounding.
    return Mean(0.0 if abs(value) < 1e-12 * max(map(abs, values)) else value, deviation, half, len(values))


def difference(own: dict[int, float], of_first: dict[int, float]) -> Mean | None:
    """Of scores by seed: the mean of own minus the first method's, over the seeds that both have; None without one."""
    common = [_less(own[seed], of_first[seed]) for seed in own if seed in of_first]
    return mean(common) if common else None


def _less(one: float, other: float) -> float:
    """Their difference, without what is left of rounding where it is 0, which would count as better or worse."""
    return 0.0 if math.isclose(one, other, rel_tol=1e-9) else one - other


@dataclass(frozen=True)
class OverTasks:
    """Of a method against the first one: mean difference over the tasks, how many there are, and the probability, by
    Wilcoxon's signed-rank test (two-sided), of differences as far from 0 as these if there were none."""

    mean: float
    tasks: int
    probability: float


def over_tasks(differences: Sequence[float]) -> OverTasks | None:
    """Of each task's mean difference; None of fewer than two tasks."""
    if len(differences) < 2:
        return None
    if any(differences):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ties among so few
            # To rounding: equal ones have one rank.
            probability = float(stats.wilcoxon([round(each, 12) for each in differences]).pvalue)
    else:
        probability = 1.0
    return OverTasks(fmean(differences), len(differences), probability)


def smallest_probability(tasks: int) -> float:
    """That the signed-rank test can give for so many tasks."""
    return 2.0 ** (1 - tasks)
