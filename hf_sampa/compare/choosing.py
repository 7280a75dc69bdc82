"""What the runs before the scored ones decide: each method's settings, and how long its steps take."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..files import in_place_of
from .config import Arguments, Comparison
from .runs import Run


FILE = "choices.json"
# Of losses and errors less is better.
LESS = ("loss", "error", "mse", "mae", "rmse", "perplexity")


def settings(comparison: Comparison, runs: Iterable[Run], root: Path) -> dict[tuple[str, str], Arguments]:
    """By task and method the combination of values with the best mean score over the seeds; of equals the first.

    A combination of which a run failed is none. A task and a method without one are left out.
    """
    if comparison.choose is None:
        return {(task, method): {} for task in comparison.tasks for method in comparison.methods}
    scores: dict[tuple[str, str], dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        result = run.result(root)
        scores[run.task, run.method][json.dumps(run.values)].append(None if result is None else result["score"])
    chosen = {}
    for (task, method), of_values in scores.items():
        whole = {values: mean(found) for values, found in of_values.items() if None not in found}
        if whole:
            better = min if is_less_better(comparison.metrics[task]) else max
            chosen[task, method] = json.loads(better(whole, key=whole.__getitem__))
    return chosen


def is_less_better(metric: str) -> bool:
    return metric.removeprefix("eval_").split("_")[-1] in LESS


def seconds_per_step(rounds: Iterable[list[Run]], root: Path) -> dict[str, list[float]]:
    """By method those of every round in which all methods have been timed."""
    found: dict[str, list[float]] = defaultdict(list)
    for runs in rounds:
        results = {run.method: run.result(root) for run in runs}
        if all(results.values()):
            for method, result in results.items():
                found[method].append(result["metrics"]["train_seconds_per_step"])
    return dict(found)


def ratios(seconds: Mapping[str, list[float]], first: str) -> dict[str, float]:
    """By method the median, over the rounds, of its seconds per step over those of the first method in the same round."""
    return {
        method: median(own / of_first for own, of_first in zip(found, seconds[first], strict=True))
        for method, found in seconds.items()
    }


def longer(comparison: Comparison, seconds: Mapping[str, list[float]], root: Path) -> dict[str, float]:
    """The first method's further name and factor for an equal time; once said, the same in every later call.

    A time is another one every time; the runs that follow from it are not.
    """
    if comparison.equal_time is None or comparison.first not in seconds:
        return {}
    file = root / FILE
    name = f"{comparison.first}, time of {comparison.equal_time}"
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in said:
        said[name] = round(ratios(seconds, comparison.first)[comparison.equal_time], 2)
        with in_place_of(file) as partial:
            partial.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return {name: said[name]}
