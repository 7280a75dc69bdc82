"""What the runs before the scored ones decide: each method's settings, and how long its steps take."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..files import in_place_of, read_json
from .config import Arguments, Comparison
from .runs import Run


FILE = "choices.json"


def settings(comparison: Comparison, runs: Iterable[Run], root: Path) -> dict[tuple[str, str], Arguments]:
    """By task and method the combination of values with the best mean score over the seeds; of equals the first.

    A combination of which a run failed, or has a score that is no number, is none. A task and a method without one are left out.
    """
    if comparison.choose is None:
        return {(task, method): {} for task in comparison.tasks for method in comparison.methods}
    scores: dict[tuple[str, str], dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        scores[run.task, run.method][json.dumps(run.values)].append(run.score(root))
    chosen = {}
    for (task, method), of_values in scores.items():
        whole = {values: mean(found) for values, found in of_values.items() if None not in found}
        if whole:
            better = min if comparison.is_less_better(task) else max
            chosen[task, method] = json.loads(better(whole, key=whole.__getitem__))
    return chosen


def seconds_per_step(rounds: Iterable[list[Run]], root: Path) -> dict[str, list[float]]:
    """By method those of every round in which all methods have been timed."""
    found: dict[str, list[float]] = defaultdict(list)
    for runs in rounds:
        results = {run.method: run.result(root) for run in runs}
        if all(results.values()):
            for method, result in results.items():
                found[method].append(result["seconds_per_step"])
    return dict(found)


def ratios(seconds: Mapping[str, list[float]], first: str) -> dict[str, float]:
    """By method the median, over the rounds, of its seconds per step over those of the first method in the same round."""
    return {
        method: median(own / of_first for own, of_first in zip(found, seconds[first], strict=True))
        for method, found in seconds.items()
    }


def longer(
    comparison: Comparison, rounds: Sequence[Sequence[Run]], seconds: Mapping[str, list[float]], root: Path
) -> dict[str, float]:
    """The first method's further name and factor for an equal time; once said, the same in every later call that times these runs.

    A time is another one every time; the runs that follow from it are not.
    """
    if comparison.equal_time is None or comparison.first not in seconds:
        return {}
    timed = sorted(run.folder(root).name for runs in rounds for run in runs)
    file, of = root / FILE, hashlib.sha256(json.dumps(timed).encode()).hexdigest()[:16]
    said: dict[str, Any] = read_json(file) if file.exists() else {}
    if of not in said:
        said[of] = round(ratios(seconds, comparison.first)[comparison.equal_time], 2)
        with in_place_of(file) as partial:
            partial.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return {comparison.longer_name: said[of]}
