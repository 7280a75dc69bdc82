"""The runs that a comparison consists of, and what is on the disk of each.

A run has a folder of its own: ``run.json``, which run it is; ``log.txt``, what it printed; ``output/``, the script's
output folder; and once it is done, ``result.json``, or ``failed.json``, if it failed when it was last tried.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import in_place_of, read_json
from .config import Arguments, Comparison


CHOOSE, TIME, SCORE = "choose", "time", "score"


@dataclass(frozen=True)
class Run:
    """One call of the script. `phase` says what for; `values` are those of its arguments that were, or are to be, chosen."""

    phase: str
    task: str
    method: str
    seed: int
    arguments: Arguments
    launch: str
    values: Arguments
    metric: str
    script: str = ""

    def folder(self, root: Path) -> Path:
        """Another one for other arguments, so that a result is never taken for another run's."""
        text = json.dumps([self.script, self.launch, sorted(self.arguments.items())], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return root / "runs" / self.phase / self.task / self.method / f"seed-{self.seed}-{digest}"

    def result(self, root: Path) -> dict[str, Any] | None:
        """What came of it; None of a run that is not done."""
        return self._read(root, "result.json")

    def failure(self, root: Path) -> Failed | None:
        """How it failed when it was last tried, if it did."""
        found = self._read(root, "failed.json")
        return found and Failed(self, found["code"], found["said"])

    def score(self, root: Path) -> float | None:
        """Of a run that is done, by the metric that is compared; None where that is not a number.

        Raises ValueError where the script said nothing of this metric.
        """
        result = self.result(root)
        if result is None:
            return None
        metrics, name = result["metrics"], self._name
        if name not in metrics:
            there = sorted(each.removeprefix("eval_") for each in metrics if each.startswith("eval_"))
            raise ValueError(
                f"metric: expected one of {', '.join(there) or 'those that the script computes, which are none'}, got {self.metric}. Correct it "
                "in the configuration; runs that are done are kept."
            )
        score = metrics[name]
        return float(score) if isinstance(score, int | float) and math.isfinite(score) else None

    def course(self, root: Path) -> list[list[float]]:
        """Of the score, pairs of step and score; of a run that is done."""
        evaluations = self.result(root)["evaluations"]
        return [[line["step"], line[self._name]] for line in evaluations if self._name in line]

    @property
    def _name(self) -> str:
        return self.metric if self.metric.startswith(("eval_", "test_")) else f"eval_{self.metric}"

    def _read(self, root: Path, name: str) -> dict[str, Any] | None:
        file = self.folder(root) / name
        return read_json(file) if file.exists() else None

    def write(self, root: Path, name: str, content: dict[str, Any]) -> None:
        """Put a file into its folder."""
        with in_place_of(self.folder(root) / name) as file:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Failed:
    """A run that ended with an error: its exit code, and the end of its log."""

    run: Run
    code: int
    said: str


def choosing(comparison: Comparison) -> Iterator[Run]:
    """Those by which settings are chosen from lists of values."""
    choice = comparison.choose
    for task, method in _pairs(comparison):
        for values in choice.values[method] if choice else ():
            yield from tried_with(comparison, task, method, values)


def tried_with(comparison: Comparison, task: str, method: str, values: Arguments) -> Iterator[Run]:
    """Those that try `values`, one for each seed that settings are chosen with."""
    choice = comparison.choose
    for seed in choice.seeds:
        yield _run(comparison, CHOOSE, task, method, seed, {**choice.arguments, **values}, values=values)


def timed(comparison: Comparison, chosen: Mapping[tuple[str, str], Arguments]) -> Iterator[list[Run]]:
    """Those that are timed, a list for each round, whose methods take turns."""
    timing = comparison.time
    task = next(iter(comparison.tasks))
    for number in range(timing.rounds if timing else 0):
        # Nothing of these runs is kept but how long their steps took.
        brief = {"max_steps": timing.steps, "save_strategy": "no", "eval_strategy": "no", "diagnostics_steps": None}
        brief |= timing.arguments
        yield [
            _run(comparison, TIME, task, method, number, {**chosen.get((task, method), {}), **brief}, timing.launch)
            for method in comparison.methods
        ]


def scored(
    comparison: Comparison, chosen: Mapping[tuple[str, str], Arguments], longer: Mapping[str, float]
) -> Iterator[Run]:
    """Those that are compared, seed by seed, so that what is there of an interrupted comparison has all methods.

    Args:
        comparison: what is compared.
        chosen: settings by task and method.
        longer: further names for the first method, and how many times the epochs it then has.
    """
    for seed in comparison.seeds:
        for task, method in _pairs(comparison):
            if (task, method) in chosen:
                values = chosen[task, method]
                yield _run(comparison, SCORE, task, method, seed, values, values=values)
        for task in comparison.tasks:
            for name, factor in longer.items():
                values = chosen.get((task, comparison.first))
                if values is not None:
                    epochs = {"num_train_epochs": round(_epochs(comparison, task, values) * factor, 3)}
                    yield _run(comparison, SCORE, task, name, seed, {**values, **epochs}, values={**values, **epochs})


def _pairs(comparison: Comparison) -> Iterator[tuple[str, str]]:
    return ((task, method) for task in comparison.tasks for method in comparison.methods)


def _epochs(comparison: Comparison, task: str, values: Arguments) -> float:
    """Of the first method."""
    given = {**comparison.arguments, **comparison.tasks[task], **comparison.methods[comparison.first], **values}
    return float(given["num_train_epochs"])


def _run(
    comparison: Comparison,
    phase: str,
    task: str,
    method: str,
    seed: int,
    own: Arguments,
    launch: str | None = None,
    values: Arguments | None = None,
) -> Run:
    of_method = comparison.methods.get(method, comparison.methods[comparison.first])
    given = {**comparison.arguments, **comparison.tasks[task], **of_method, **own}
    arguments = {name: value for name, value in given.items() if value is not None}
    return Run(
        phase,
        task,
        method,
        seed,
        arguments,
        launch or comparison.launch,
        values or {},
        comparison.metrics[task],
        f"{comparison.script.resolve().parent.name}/{comparison.script.name}",
    )
