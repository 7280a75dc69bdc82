"""A search over ranges of settings, by optuna, in the place of lists of values.

Nothing is kept but the runs: called again, the sampler suggests what it suggested before, and finds these runs done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

import optuna

from .config import Arguments, Comparison, Range
from .runs import Run, tried_with


def search(
    comparison: Comparison, carry_out: Callable[[Sequence[Run]], None], root: Path
) -> Iterator[tuple[tuple[str, str], list[Run]]]:
    """The runs of every trial, by task and method, all methods with as many trials.

    Args:
        comparison: its section choose has ranges.
        carry_out: carries out runs; those of a trial of all tasks and methods at once.
        root: of the comparison's files.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    choice = comparison.choose
    studies = {
        (task, method): optuna.create_study(
            direction="minimize" if comparison.is_less_better(task) else "maximize",
            sampler=optuna.samplers.TPESampler(seed=0),
        )
        for task in comparison.tasks
        for method in comparison.methods
    }
    for _ in range(choice.trials):
        asked = {pair: study.ask() for pair, study in studies.items()}
        runs = {
            pair: list(tried_with(comparison, *pair, suggested(trial, choice.ranges[pair[1]])))
            for pair, trial in asked.items()
        }
        carry_out([run for several in runs.values() for run in several])
        for pair, several in runs.items():
            scores = [score for run in several if (score := run.score(root)) is not None]
            state = None if len(scores) == len(several) else optuna.trial.TrialState.FAIL
            studies[pair].tell(asked[pair], None if state else mean(scores), state=state)
        yield from runs.items()


def suggested(trial: optuna.Trial, ranges: Mapping[str, Range]) -> Arguments:
    """Values with three significant digits, as a person would write them, within the ranges."""

    def within(name: str, of: Range) -> float:
        return min(max(float(f"{trial.suggest_float(name, of.low, of.high, log=of.log):.3g}"), of.low), of.high)

    return {name: within(name, each) for name, each in ranges.items()}
