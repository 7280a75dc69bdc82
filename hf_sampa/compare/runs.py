"""The runs that a comparison consists of, and what is on the disk of each.

A run has a folder of its own: ``run.json``, which run it is; ``log.txt``, what it printed; ``output/``, the script's
output folder; and once it is done, ``result.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import in_place_of
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

    def folder(self, root: Path) -> Path:
        """Another one for other arguments, so that a result is never taken for another run's."""
        text = json.dumps([self.launch, sorted(self.arguments.items())], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return root / "runs" / self.phase / self.task / self.method / f"seed-{self.seed}-{digest}"

    def result(self, root: Path) -> dict[str, Any] | None:
        """What came of it; None of a run that is not done."""
        file = self.folder(root) / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write(self, root: Path) -> Path:
        """Make its folder, with what it is."""
        folder = self.folder(root)
        folder.mkdir(parents=True, exist_ok=True)
        with in_place_of(folder / "run.json") as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return folder


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
    """Of the first method. Raises ValueError where nobody says how many."""
    given = {**comparison.arguments, **comparison.tasks[task], **comparison.methods[comparison.first], **values}
    if "num_train_epochs" not in given or "max_steps" in given:
        raise ValueError(
            "equal_time: expected num_train_epochs among the arguments, and no max_steps, got "
            f"{ {name: given[name] for name in ('num_train_epochs', 'max_steps') if name in given} }. Set it."
        )
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
        phase, task, method, seed, arguments, launch or comparison.launch, values or {}, comparison.metrics[task]
    )
