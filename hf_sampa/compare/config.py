"""What a comparison is, from its YAML file.

.. code-block:: yaml

    script: run_glue.py                 # beside this file
    arguments:                          # of all runs, as on the script's command line
      model_name_or_path: bert-base-uncased
      batch_size: 32
      num_train_epochs: 3
      learning_rate: 2.0e-5             # where none is chosen
    metric: accuracy                    # what is compared; or by task, metric: {SST-2: accuracy, CoLA: matthews_correlation}
    better: more                        # or less; where it is left out, less of losses and error rates, and more of all others
    tasks:                              # arguments of each
      SST-2: {task_name: sst2}
    methods:                            # arguments of each; the first is the one that the others are compared with
      AdamW: {method: adamw}
      SAMPa: {method: sampa, lmbda: 0.1}
    seeds: [1, 2, 3]
    choose:                             # settings that are chosen for each method and task, before anything is scored
      arguments: {train_val_split: 0.2} # which make the script score on a part of the training data; null leaves one of all runs out
      seeds: [101]
      trials: 0                         # or, for a search, how many, and ranges in the place of lists
      values:                           # as many combinations for each method
        AdamW: {learning_rate: [1.0e-5, 2.0e-5, 5.0e-5]}
        SAMPa: {rho: [0.01, 0.05, 0.1]} # with trials: {rho: {low: 0.01, high: 0.2, log: true}}
    time:                               # seconds per step, of runs that have the machine for themselves
      launch: cpu_2_processes
      steps: 20
      rounds: 3
      arguments: {}                     # of these runs only
    equal_time: SAMPa                   # the first method once more, with as many epochs as take the time of this one
    landscape:                          # the loss between the first and the last method's weights, and around those of all
      task: SST-2
      seed: 1
      points: 12                        # on each line
      directions: 2                     # around each
      arguments: {}                     # with which the script scores trained weights; null leaves one of all runs out
    prepare:                            # commands that make what the runs need, each once
      - python make_data.py
    paper:                              # what others reported, to stand beside
      title: Table 6 of the paper
      rows: {SAMPa: {SST-2: 94.1}}
    launch: one_process                 # of all other runs
"""

from __future__ import annotations

import itertools
import math
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
LONGEST_NAME = 100
MEANT = {"metric": "the name of a score, such as accuracy", "seeds": "a list of whole numbers"}
# Of these less is better; in the last word of a metric's name.
LESS = ("loss", "error", "rate", "mse", "mae", "rmse", "perplexity", "wer", "cer", "ter", "nll", "brier", "ece")
# Methods that differ in these do not make equally many updates of equal batches.
OF_UPDATES = (
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_train_samples",
)


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
    better: str | None = None

    def is_less_better(self, task: str) -> bool:
        """Whether the smaller score of two is the better one."""
        last_word = self.metrics[task].removeprefix("eval_").split("_")[-1]
        return last_word in LESS if self.better is None else self.better == "less"

    @property
    def longer_name(self) -> str:
        """Of the first method with the time of another one."""
        return f"{self.first}, time of {self.equal_time}"

    @property
    def uneven(self) -> list[str]:
        """Arguments that let some methods make more updates than others, or of other batches."""
        tried = self.choose.values.values() if self.choose else ()
        of_methods = [set(own) for own in self.methods.values()] + [set(own) for several in tried for own in several]
        return [
            name
            for name in OF_UPDATES
            if any(name in own for own in of_methods)
            and len(
                {own.get(name) for own in (*self.methods.values(), *(own for several in tried for own in several))}
            )
            > 1
        ]

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
        given = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected YAML, got something else: {error}") from error
    return _Reader(file, trials).comparison(given)


class _Loader(yaml.SafeLoader):
    """Of two values under one name YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for place, (name, _) in enumerate(node.value):
            if names[place] in names[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{names[place]!r} is there twice", name.start_mark
                )
        return super().construct_mapping(node, deep)


class _Reader:
    """Takes a file's content apart; every complaint names the file and the place in it."""

    def __init__(self, file: Path, trials: int | None = None):
        self.file, self.trials = file, trials

    def comparison(self, given: Any) -> Comparison:
        needed = ("script", "tasks", "methods", "metric", "seeds")
        others = ("arguments", "launch", "choose", "time", "equal_time", "landscape", "prepare", "paper", "better")
        given = self._section(given, "", needed, others)
        given = {name: value for name, value in given.items() if value is not None or name in needed}
        tasks, methods = (self._named(given[name], name) for name in ("tasks", "methods"))
        seeds = self._seeds(given["seeds"], "seeds")
        if self.trials and "choose" not in given:
            self._fail(
                "choose", "ranges for a search", None, "Add the section; see python -m hf_sampa.compare --help."
            )
        if given.get("better", "more") not in ("more", "less"):
            self._fail("better", "more or less", given["better"], "Correct it.")
        choose = self._choice(given["choose"], methods) if "choose" in given else None
        made = Comparison(
            # Files of one name in several folders are several comparisons.
            name=f"{self.file.resolve().parent.name}/{self.file.stem}",
            script=self._script(given["script"]),
            arguments=self._arguments(given.get("arguments", {}), "arguments"),
            tasks=tasks,
            methods=methods,
            metrics=self._metrics(given["metric"], tasks),
            seeds=seeds,
            launch=self._launch(given.get("launch", "one_process"), "launch"),
            choose=choose,
            time=self._timing(given["time"]) if "time" in given else None,
            equal_time=given.get("equal_time"),
            landscape=self._landscape(given["landscape"], tasks, methods, seeds) if "landscape" in given else None,
            prepare=self._commands(given.get("prepare", [])),
            paper=self._paper(given["paper"], tasks) if "paper" in given else {},
            better=given.get("better"),
        )
        self._check_equal_time(made)
        self._check_once(made)
        self._check_as_tuned(made)
        self._check_different(made)
        return made

    def _fail(self, place: str, expected: str, got: Any, way_out: str) -> None:
        raise ValueError(f"{self.file}: {place}: expected {expected}, got {got!r}. {way_out}")

    def _section(self, given: Any, place: str, needed: tuple[str, ...], others: tuple[str, ...]) -> dict[str, Any]:
        where = place.removesuffix(": ") or "the file"
        if not isinstance(given, dict):
            self._fail(where, "names with values", given, "See python -m hf_sampa.compare --help.")
        for name in needed:
            if name not in given:
                self._fail(f"{place}{name}", MEANT.get(name, "a value"), None, "Add it.")
        unknown = [name for name in given if name not in needed + others]
        if unknown:
            self._fail(where, f"only {', '.join(needed + others)}", unknown[0], "Leave it out.")
        return given

    def _named(self, given: Any, place: str) -> dict[str, Arguments]:
        if not isinstance(given, dict) or not given:
            self._fail(place, "names, each with arguments of the script", given, "Give at least one.")
        for name in given:
            # They are names of folders and of columns, and stand in pictures.
            if not isinstance(name, str) or not _is_a_name(name):
                self._fail(place, "names that can be those of folders", name, "Choose another one.")
        return {
            name: self._arguments({} if each is None else each, f"{place}: {name}") for name, each in given.items()
        }

    def _arguments(self, given: Any, place: str, none: bool = False) -> dict[str, Any]:
        """With `none`, a value may be None: the argument is left out where it was given before."""
        if not isinstance(given, dict):
            self._fail(place, "arguments of the script by name", given, "Write name: value.")
        for name, value in given.items():
            if not isinstance(name, str):
                self._fail(place, "names of arguments", name, "Correct it.")
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
        if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            self._fail(place, "whole numbers from 0 up, each once", given, "Write for example [1, 2, 3].")
        return tuple(seeds)

    def _script(self, given: Any) -> Path:
        script = self.file.parent / str(given)
        if not script.is_file():
            self._fail("script", "the path of a script, from the folder of this file", given, "Correct it.")
        return script

    def _metrics(self, given: Any, tasks: Mapping[str, Arguments]) -> dict[str, str]:
        by_task = dict.fromkeys(tasks, given) if isinstance(given, str) else given
        named = isinstance(by_task, dict) and all(isinstance(each, str) and each for each in by_task.values())
        if not named or by_task.keys() != tasks.keys():
            self._fail("metric", f"one name, or one for each of {', '.join(tasks)}", given, "Correct it.")
        return by_task

    def _launch(self, given: Any, place: str) -> str:
        if not isinstance(given, str) or given not in configurations():
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
        if all(value is None for value in common[0].values()):
            way_out = (
                "What is scored in the end may not choose: add train_val_split: 0.2, or what your script calls it."
            )
            self._fail(
                "choose: arguments", "those with which a part of the training data is held out", common[0], way_out
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
        for argument, each in given.items():
            if isinstance(each, list):
                way_out = "Write {low: 0.01, high: 0.2}, or search without --search and trials."
                self._fail(f"{place}: {argument}", "a range, as trials are to be searched in", each, way_out)
        found = {}
        for argument, each in given.items():
            each = self._section(each, f"{place}: {argument}: ", ("low", "high"), ("log",))
            ends = (each["low"], each["high"])
            if not all(type(end) in (int, float) and math.isfinite(end) for end in ends):
                self._fail(f"{place}: {argument}", "low and high as numbers", each, "Write 1.0e-3, and not 1e-3.")
            if not isinstance(each.get("log", False), bool):
                self._fail(f"{place}: {argument}: log", "true or false", each["log"], "Correct it.")
            if not ends[0] < ends[1] or (each.get("log") and ends[0] <= 0):
                self._fail(f"{place}: {argument}", "low below high, and above 0 with log", each, "Correct it.")
            found[argument] = Range(**each)
        return found

    def _combinations(self, given: Any, name: str) -> Iterator[dict[str, Value]]:
        place = f"choose: values: {name}"
        if not isinstance(given, dict):
            self._fail(place, "lists of values by argument", given, "Write for example rho: [0.01, 0.05].")
        lists = [self._list(each, f"{place}: {argument}") for argument, each in given.items()]
        for argument, each in given.items():
            if not each or any(value in each[:i] for i, value in enumerate(each)):
                self._fail(f"{place}: {argument}", "values, each once", each, "Correct it.")
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

    def _commands(self, given: Any) -> tuple[str, ...]:
        for line in self._list(given, "prepare"):
            try:
                words = shlex.split(line) if isinstance(line, str) else []
            except ValueError:  # a quotation that does not end
                words = []
            if not words:
                self._fail("prepare", "commands", line, "Write each as on a command line.")
        return tuple(given)

    def _paper(self, given: Any, tasks: Mapping[str, Arguments]) -> dict[str, Any]:
        given = self._section(given, "paper: ", ("rows",), ("title", "text"))
        for method, values in given["rows"].items() if isinstance(given["rows"], dict) else [("rows", None)]:
            if not isinstance(values, dict) or not values.keys() <= tasks.keys():
                self._fail(
                    f"paper: {method}", f"what was reported by task, of {', '.join(tasks)}", values, "Correct it."
                )
        return given

    def _landscape(
        self, given: Any, tasks: Mapping[str, Arguments], methods: Mapping[str, Arguments], seeds: tuple[int, ...]
    ) -> Landscape:
        given = self._section(given, "landscape: ", (), ("task", "seed", "points", "directions", "arguments"))
        made = Landscape(**{"task": next(iter(tasks)), "seed": seeds[0], **given})
        if len(methods) < 2:
            self._fail("landscape", "two methods, to look between their weights", list(methods), "Leave it out.")
        if made.task not in tasks:
            self._fail("landscape: task", f"one of {', '.join(tasks)}", made.task, "Correct it.")
        if type(made.seed) is not int or made.seed not in seeds:
            self._fail("landscape: seed", f"one of the seeds {', '.join(map(str, seeds))}", made.seed, "Correct it.")
        for name, part in (("points", 4), ("directions", 1)):
            value = getattr(made, name)
            if type(value) is not int or value < part or value % part:
                multiple = "a whole number from 1 up" if part == 1 else f"a multiple of {part}"
                self._fail(f"landscape: {name}", multiple, value, "Correct it.")
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
        if made.longer_name in made.methods:
            self._fail(
                "methods",
                "names other than that of the first method with an equal time",
                made.longer_name,
                "Choose another one.",
            )
        tried = made.choose.values[made.first][0] if made.choose and made.choose.values else {}
        for task in made.tasks:
            given = {**made.arguments, **made.tasks[task], **made.methods[made.first], **tried}
            if "num_train_epochs" not in given or "max_steps" in given:
                self._fail(
                    "equal_time",
                    f"num_train_epochs among the arguments of {task}, and no max_steps",
                    {name: given[name] for name in ("num_train_epochs", "max_steps") if name in given},
                    "Set the epochs of which the time makes more.",
                )

    def _check_once(self, made: Comparison) -> None:
        """What several sections say is not said twice, since one of them would be without effect."""
        for task, method in itertools.product(made.tasks, made.methods):
            twice = made.tasks[task].keys() & made.methods[method].keys()
            if twice:
                self._fail(
                    f"tasks: {task}", f"arguments that the method {method} has not", min(twice), "Leave one out."
                )
        if made.choose is None:
            return
        for method, own in made.methods.items():
            of_lists = [set(values) for values in made.choose.values.get(method, ())]
            settings = set().union(*of_lists, made.choose.ranges.get(method, ()))
            elsewhere = set(own) | {name for task in made.tasks.values() for name in task}
            for place, names, others in (
                (f"choose: values: {method}", settings, elsewhere | set(made.choose.arguments)),
                ("choose: arguments", set(made.choose.arguments), elsewhere),
            ):
                if twice := names & others:
                    self._fail(place, "arguments that stand in no other place", min(twice), "Leave one of them out.")

    def _check_as_tuned(self, made: Comparison) -> None:
        """What is chosen for the first method, as the learning rate, is not left to chance in the others."""
        choice = made.choose
        if choice is None:
            return

        def chosen(method: str) -> set[str]:
            return set(choice.ranges.get(method, ())) | {name for own in choice.values.get(method, ()) for name in own}

        for task, method in itertools.product(made.tasks, list(made.methods)[1:]):
            given = {*made.arguments, *made.tasks[task], *made.methods[method], *chosen(method)}
            if missing := sorted(chosen(made.first) - given):
                self._fail(
                    f"choose: values: {method}",
                    f"{missing[0]}, which is chosen for {made.first}, among its values or the arguments of all runs",
                    None,
                    "It would be the script's default. Add it.",
                )

    def _check_different(self, made: Comparison) -> None:
        """Two names for one thing would be told apart by chance."""
        for what, named in (("tasks", made.tasks), ("methods", made.methods)):
            for (name, own), (other, same) in itertools.combinations(named.items(), 2):
                choose = made.choose if what == "methods" else None
                tried = [
                    (choose.values.get(each), choose.ranges.get(each)) if choose else None for each in (name, other)
                ]
                if own == same and tried[0] == tried[1]:
                    self._fail(
                        what, "something else under every name", f"{name} and {other}", "Leave one of them out."
                    )


def _is_a_name(text: str) -> bool:
    """Of a folder; matplotlib leaves out what begins with an underscore, and takes a dollar for mathematics."""
    wrong = set(text) & set('/\\:*?"<>|$') or not text.isprintable() or text[:1] in "._" or len(text) > LONGEST_NAME
    return bool(text.strip()) and not wrong


def as_words(arguments: Mapping[str, Value | None]) -> list[str]:
    """As on a command line."""
    return [word for name, value in arguments.items() if value is not None for word in (f"--{name}", str(value))]


def as_text(arguments: Mapping[str, Value | None]) -> str:
    """For a person, who may copy it."""
    return shlex.join(as_words(arguments))
