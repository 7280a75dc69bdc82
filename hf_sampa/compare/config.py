"""What a comparison is, from its YAML file.

.. code-block:: yaml

    script: run_glue.py                 # beside this file
    arguments:                          # of all runs, as on the script's command line
      model_name_or_path: bert-base-uncased
      batch_size: 32
    metric: accuracy                    # what is compared; or by task, metric: {SST-2: accuracy, CoLA: matthews_correlation}
    tasks:                              # arguments of each
      SST-2: {task_name: sst2}
    methods:                            # arguments of each; the first is the one that the others are compared with
      AdamW: {method: adamw}
      SAMPa: {method: sampa, lmbda: 0.1}
    seeds: [1, 2, 3]
    choose:                             # settings that are chosen for each method and task, before anything is scored
      arguments: {train_val_split: 0.2} # which make the script score on a part of the training data; null leaves one of all runs out
      seeds: [101]
      values:                           # as many combinations for each method; or, with trials: 8, ranges for a search
        AdamW: {learning_rate: [1.0e-5, 2.0e-5, 5.0e-5]}
        SAMPa: {rho: [0.01, 0.05, 0.1]} # with trials: {rho: {low: 0.01, high: 0.2, log: true}}
    time:                               # seconds per step, of runs that have the machine for themselves
      launch: cpu_2_processes
      steps: 20
      rounds: 3
    equal_time: SAMPa                   # the first method once more, with as many epochs as take the time of this one
    landscape: {task: SST-2, seed: 1}   # the loss between the first and the last method's weights, and around each
    launch: one_process                 # of all other runs
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..launch import configurations


Value = str | int | float | bool
Arguments = Mapping[str, Value]
# What a comparison sets itself.
OWN = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir")


@dataclass(frozen=True)
class Range:
    """Of the values of a setting, both ends among them; `log`: as likely between 0.01 and 0.1 as between 0.1 and 1."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """Of settings, by what a method scores with them on a part of the training data.

    Either of combinations of values, or by so many trials within ranges.
    """

    arguments: Mapping[str, Value | None]  # None for none
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[Arguments, ...]] = field(default_factory=dict)  # combinations by method
    ranges: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)  # by method and setting
    trials: int = 0


@dataclass(frozen=True)
class Timing:
    """Of steps, in runs of their own that have the machine for themselves."""

    launch: str = "cpu_2_processes"
    steps: int = 20
    rounds: int = 3
    arguments: Mapping[str, Value | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Landscape:
    """Of which runs the loss is looked at around the weights; `arguments` with which the script scores these, None for none."""

    task: str
    seed: int
    points: int = 12
    directions: int = 2
    arguments: Mapping[str, Value | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """See the module's docstring. `metrics` has a name for every task; `paper` what others reported, by method and task."""

    name: str
    script: Path
    arguments: Arguments
    tasks: Mapping[str, Arguments]
    methods: Mapping[str, Arguments]
    metrics: Mapping[str, str]
    seeds: tuple[int, ...]
    launch: str = "one_process"
    choose: Choice | None = None
    time: Timing | None = None
    equal_time: str | None = None
    landscape: Landscape | None = None
    prepare: tuple[str, ...] = ()
    paper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.methods))


def read(file: Path, trials: int | None = None) -> Comparison:
    """The comparison that a YAML file describes; with `trials`, by a search within the ranges under choose.

    Raises:
        ValueError: the file is no YAML, or says something that cannot be run or would not be fair.
        OSError: it cannot be read.
    """
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected YAML, got something else: {error}") from error
    return _Reader(file, trials).comparison(given)


class _Reader:
    """Takes a file's content apart; every complaint names the file and the place in it."""

    def __init__(self, file: Path, trials: int | None = None):
        self.file, self.trials = file, trials

    def comparison(self, given: Any) -> Comparison:
        needed = ("script", "tasks", "methods", "metric", "seeds")
        others = ("arguments", "launch", "choose", "time", "equal_time", "landscape", "prepare", "paper")
        given = self._section(given, "", needed, others)
        tasks, methods = (self._named(given[name], name) for name in ("tasks", "methods"))
        if self.trials and not given.get("choose"):
            self._fail(
                "choose", "ranges for a search", None, "Add the section; see python -m hf_sampa.compare --help."
            )
        choose = self._choice(given["choose"], methods) if given.get("choose") else None
        made = Comparison(
            # Files of one name in several folders are several comparisons.
            name=f"{self.file.resolve().parent.name}/{self.file.stem}",
            script=self._script(given["script"]),
            arguments=self._arguments(given.get("arguments") or {}, "arguments"),
            tasks=tasks,
            methods=methods,
            metrics=self._metrics(given["metric"], tasks),
            seeds=self._seeds(given["seeds"], "seeds"),
            launch=self._launch(given.get("launch", "one_process"), "launch"),
            choose=choose,
            time=self._timing(given["time"]) if given.get("time") else None,
            equal_time=given.get("equal_time"),
            landscape=self._landscape(given["landscape"], tasks, given["seeds"]) if given.get("landscape") else None,
            prepare=tuple(self._list(given.get("prepare") or [], "prepare")),
            paper=given.get("paper") or {},
        )
        self._check_equal_time(made)
        self._check_once(made)
        return made

    def _fail(self, place: str, expected: str, got: Any, way_out: str) -> None:
        raise ValueError(f"{self.file}: {place}: expected {expected}, got {got!r}. {way_out}")

    def _section(self, given: Any, place: str, needed: tuple[str, ...], others: tuple[str, ...]) -> dict[str, Any]:
        where = place.removesuffix(": ") or "the file"
        if not isinstance(given, dict):
            self._fail(where, "names with values", given, "See python -m hf_sampa.compare --help.")
        for name in needed:
            if name not in given:
                self._fail(f"{place}{name}", "a value", None, "Add it.")
        unknown = [name for name in given if name not in needed + others]
        if unknown:
            self._fail(where, f"only {', '.join(needed + others)}", unknown[0], "Leave it out.")
        return given

    def _named(self, given: Any, place: str) -> dict[str, Arguments]:
        if not isinstance(given, dict) or not given:
            self._fail(place, "names, each with arguments of the script", given, "Give at least one.")
        for name in given:
            # They are names of folders and of columns.
            if not isinstance(name, str) or not name.strip() or set(name) & set('/\\:*?"<>|\n'):
                self._fail(place, "names that can be those of folders", name, "Choose another one.")
        return {name: self._arguments(each or {}, f"{place}: {name}") for name, each in given.items()}

    def _arguments(self, given: Any, place: str, none: bool = False) -> dict[str, Any]:
        """With `none`, a value may be None: the argument is left out where it was given before."""
        if not isinstance(given, dict):
            self._fail(place, "arguments of the script by name", given, "Write name: value.")
        for name, value in given.items():
            if name in OWN:
                self._fail(place, "arguments that no comparison sets itself", name, "Leave it out.")
            if not (isinstance(value, Value) or (none and value is None)):
                self._fail(f"{place}: {name}", "one value", value, "Several values belong under choose.")
        return given

    def _list(self, given: Any, place: str) -> list[Any]:
        if not isinstance(given, list):
            self._fail(place, "a list", given, "Write [one, two].")
        return given

    def _seeds(self, given: Any, place: str) -> tuple[int, ...]:
        seeds = self._list(given, place)
        if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
            self._fail(place, "whole numbers from 0 up, each once", given, "Write for example [1, 2, 3].")
        return tuple(seeds)

    def _script(self, given: Any) -> Path:
        script = self.file.parent / str(given)
        if not script.is_file():
            self._fail("script", "the path of a script, from the folder of this file", given, "Correct it.")
        return script

    def _metrics(self, given: Any, tasks: Mapping[str, Arguments]) -> dict[str, str]:
        by_task = dict.fromkeys(tasks, given) if isinstance(given, str) else given
        if not isinstance(by_task, dict) or by_task.keys() != tasks.keys():
            self._fail("metric", f"one name, or one for each of {', '.join(tasks)}", given, "Correct it.")
        return by_task

    def _launch(self, given: Any, place: str) -> str:
        if given not in configurations():
            self._fail(place, f"one of {', '.join(configurations())}", given, "See python -m hf_sampa config.")
        return given

    def _choice(self, given: Any, methods: Mapping[str, Arguments]) -> Choice:
        given = self._section(given, "choose: ", ("arguments", "seeds", "values"), ("trials",))
        values, trials = given["values"], self.trials or given.get("trials", 0)
        if not isinstance(values, dict) or values.keys() != methods.keys():
            self._fail("choose: values", f"values for each of {', '.join(methods)}", values, "Give each its own.")
        if type(trials) is not int or trials < 0:
            self._fail("choose: trials", "a whole number", trials, "Correct it.")
        common = (
            self._arguments(given["arguments"], "choose: arguments", none=True),
            self._seeds(given["seeds"], "choose: seeds"),
        )
        if trials:
            return Choice(
                *common, ranges={name: self._ranges(each, name) for name, each in values.items()}, trials=trials
            )
        combinations = {name: tuple(self._combinations(each, name)) for name, each in values.items()}
        counts = {name: len(each) for name, each in combinations.items()}
        if len(set(counts.values())) > 1:
            way_out = "Who may try more finds more by chance: give every method as many combinations."
            self._fail("choose: values", "as many combinations for every method", counts, way_out)
        return Choice(*common, combinations)

    def _ranges(self, given: Any, name: str) -> dict[str, Range]:
        place = f"choose: values: {name}"
        if not isinstance(given, dict) or not given:
            self._fail(place, "ranges by argument", given, "Write for example rho: {low: 0.01, high: 0.2, log: true}.")
        found = {}
        for argument, each in given.items():
            each = self._section(each, f"{place}: {argument}: ", ("low", "high"), ("log",))
            ends = (each["low"], each["high"])
            if (
                not all(type(end) in (int, float) for end in ends)
                or not ends[0] < ends[1]
                or (each.get("log") and ends[0] <= 0)
            ):
                self._fail(f"{place}: {argument}", "low below high, and above 0 with log", each, "Correct it.")
            found[argument] = Range(**each)
        return found

    def _combinations(self, given: Any, name: str) -> Iterator[dict[str, Value]]:
        place = f"choose: values: {name}"
        if not isinstance(given, dict):
            self._fail(place, "lists of values by argument", given, "Write for example rho: [0.01, 0.05].")
        lists = [self._list(each, f"{place}: {argument}") for argument, each in given.items()]
        for values in itertools.product(*lists):
            yield self._arguments(dict(zip(given, values, strict=True)), place)

    def _timing(self, given: Any) -> Timing:
        given = self._section(given, "time: ", (), ("launch", "steps", "rounds", "arguments"))
        made = Timing(**given)
        self._launch(made.launch, "time: launch")
        for name in ("steps", "rounds"):
            if type(getattr(made, name)) is not int or getattr(made, name) < 1:
                self._fail(f"time: {name}", "a whole number of at least 1", getattr(made, name), "Correct it.")
        self._arguments(made.arguments, "time: arguments", none=True)
        return made

    def _landscape(self, given: Any, tasks: Mapping[str, Arguments], seeds: list[int]) -> Landscape:
        given = self._section(given, "landscape: ", (), ("task", "seed", "points", "directions", "arguments"))
        made = Landscape(**{"task": next(iter(tasks)), "seed": seeds[0], **given})
        if made.task not in tasks:
            self._fail("landscape: task", f"one of {', '.join(tasks)}", made.task, "Correct it.")
        if made.seed not in seeds:
            self._fail("landscape: seed", f"one of the seeds {', '.join(map(str, seeds))}", made.seed, "Correct it.")
        for name, least in (("points", 4), ("directions", 1)):
            if type(getattr(made, name)) is not int or getattr(made, name) < least or getattr(made, name) % least:
                self._fail(
                    f"landscape: {name}", f"a whole number of at least {least}", getattr(made, name), "Correct it."
                )
        self._arguments(made.arguments, "landscape: arguments", none=True)
        return made

    def _check_equal_time(self, made: Comparison) -> None:
        others = list(made.methods)[1:]
        if made.equal_time is None:
            return
        if made.equal_time not in others:
            self._fail("equal_time", f"one of {', '.join(others)}", made.equal_time, "Correct it.")
        if made.time is None:
            self._fail("equal_time", "a section time beside it", None, "Add time: {}, which measures the steps.")

    def _check_once(self, made: Comparison) -> None:
        """What several sections say is not said twice, since one of them would be without effect."""
        for task, method in itertools.product(made.tasks, made.methods):
            twice = made.tasks[task].keys() & made.methods[method].keys()
            if twice:
                self._fail(
                    f"tasks: {task}", f"arguments that the method {method} has not", min(twice), "Leave one out."
                )


def as_words(arguments: Mapping[str, Value | None]) -> list[str]:
    """As on a command line."""
    return [word for name, value in arguments.items() if value is not None for word in (f"--{name}", str(value))]


def as_text(arguments: Mapping[str, Value | None]) -> str:
    """For a person, who may copy it."""
    return shlex.join(as_words(arguments))
