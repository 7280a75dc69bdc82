"""Evaluations of a run: of which weights and which data they are, as results and as a curve for the model card."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult
from transformers import Trainer
from transformers.trainer_utils import has_length


MOST_ROWS = 30
# What an evaluation logs that is no result.
COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
TRAINING = ("loss", "perturbed_loss", "sharpness", "grad_norm")
# Metric prefixes that name a part of the run's own data set.
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
# Builders whose names say nothing of the data.
FILES = tuple(
    "csv json pandas parquet text generator arrow sql xml spark webdataset hdf5 lance imagefolder audiofolder videofolder "
    "pdffolder cache_dataset".split()
)


@dataclass
class Evaluation:
    """One evaluation of one data set.

    Attributes:
        line: what was logged; its place in the log, where that is still to be read from a checkpoint.
        step: whose weights were evaluated; with `load_best_model_at_end` not that of the line.
        prefix: of the metrics' names in `line`, without the underscore.
        name: which of several evaluation data sets; "" for the only one, None for data that are not the run's.
        other: what is known of such data, in place of what is known of the run's: `name`, `type`, `config`, `split`.
        samples: how many, where that is known.
    """

    line: Any
    step: int
    prefix: str = "eval"
    name: str | None = ""
    other: dict[str, str | None] = field(default_factory=dict)
    samples: int | None = None

    def metrics(self) -> dict[str, Any]:
        """By their names without the prefix, and without what the evaluation cost."""
        start = f"{self.prefix}_"
        found = {key.removeprefix(start): value for key, value in self.line.items() if key.startswith(start)}
        return {name: value for name, value in found.items() if name not in COSTS}

    def data(self, own: dict[str, str | None]) -> dict[str, str | None]:
        """Name, type, configuration and split of the data, `own` being those of the run's."""
        part = (self.name or "").removeprefix(f"{own['split']}_")
        return own | {"split": "_".join(filter(None, (own["split"], part))) or None} | self.other


def bound(trainer: Trainer, recorded: list[Evaluation]) -> list[Evaluation]:
    """`recorded`, with the lines of the log that those from a checkpoint know by their place."""
    for each in recorded:
        if isinstance(each.line, int):
            each.line = trainer.state.log_history[each.line]
    return recorded


def plain(recorded: list[Evaluation], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`recorded` as JSON can say it: the place in the log for each line, without those whose line a callback took out."""
    places = {id(line): place for place, line in enumerate(history)}
    return [{**vars(each), "line": places[id(each.line)]} for each in recorded if id(each.line) in places]


def record(
    trainer: Trainer, lines: list[dict[str, Any]], dataset: Any = None, prefix: str = "eval"
) -> Evaluation | None:
    """The evaluation of `dataset`, given as to `Trainer.evaluate`, that has just logged `lines`; None if there was none."""
    line = next((line for line in lines if f"{prefix}_runtime" in line), None)
    if line is None:  # several data sets, each of which was an evaluation of its own
        return None
    own = _own(trainer)
    if dataset is None or isinstance(dataset, str):
        name: str | None = dataset or ""
        dataset = own.get(name)
    else:
        name = next((name for name, each in own.items() if each is dataset), None)
    other = {}
    if name is None or len({_builder(each) for each in own.values()}) > 1:
        other = _other(dataset, prefix.removeprefix("eval_"), split_of(dataset, trainer), own)
    return Evaluation(line, trainer.weights_step, prefix, name, other, _length(dataset))


def _own(trainer: Trainer) -> dict[str, Any]:
    return trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}


def split_of(dataset: Any, trainer: Trainer) -> str | None:
    """The split that `dataset` says it is; None where that is the training data's, of which it is a part then."""
    split, train = (getattr(each, "split", None) for each in (dataset, trainer.train_dataset))
    return None if split is None or (str(split) == str(train) and dataset is not trainer.train_dataset) else str(split)


def _length(dataset: Any) -> int | None:
    return len(dataset) if has_length(dataset) else None


def _builder(dataset: Any) -> tuple[str, str | None] | None:
    """What `datasets` calls the data set and its configuration, where it knows them."""
    name = getattr(dataset, "builder_name", None)
    return None if not name or name in FILES else (name, dataset.config_name)


def _other(dataset: Any, prefix: str, split: str | None, own: dict[str, Any]) -> dict[str, str | None]:
    """What is known of data that are not, or not all, of the run's data set; `split` is what they say they are."""
    length, builder = _length(dataset), _builder(dataset)
    first = next(iter(own.values()), None)
    if builder is not None and (builder != _builder(first) or (len(own) > 1 and dataset in own.values())):
        return {"name": builder[0], "type": builder[0], "config": builder[1], "split": split}
    if builder is not None and split is not None:
        whole = split != str(getattr(first, "split", None))
        return {"split": split if whole else f"{split}, {length} samples"}
    if prefix in SPLITS:
        return {"split": prefix}
    name = f"another data set of {length} samples" if prefix == "eval" and length is not None else "another data set"
    return {"name": name if prefix == "eval" else prefix, "type": None, "config": None, "split": split}


def evaluations(trainer: Trainer, recorded: list[Evaluation]) -> list[Evaluation]:
    """All of the run, in order; those that another process of it made before a checkpoint, from the log."""
    own, known, found = _own(trainer), {id(each.line): each for each in bound(trainer, recorded)}, []
    for line in trainer.state.log_history:
        if id(line) in known:
            found.append(known[id(line)])
        elif "train_runtime" not in line and any(key.startswith("eval_") for key in line):
            name = next((name for name in own if name and f"eval_{name}_runtime" in line), "")
            prefix = f"eval_{name}" if name else "eval"
            found.append(Evaluation(line, line["step"], prefix, name, samples=_length(own.get(name))))
    return found


@dataclass
class Result:
    """A metric's last value, of the card's weights or, where these were not evaluated, of weights before them."""

    entry: EvalResult
    step: int
    samples: int | None

    def cells(self) -> list[str]:
        """For a table: data set, split, samples, step, metric, value."""
        entry = self.entry
        where = [entry.dataset_name, entry.dataset_split or "evaluation", self.samples, self.step]
        return [cell(each) for each in [*where, entry.metric_name, entry.metric_value]]


def results(found: list[Evaluation], weights_step: int, task: str, own: dict[str, str | None]) -> list[Result]:
    """Each metric of each data set, as last found for weights up to `weights_step`; `own` describes the run's data."""
    last: dict[tuple, Result] = {}
    for each in found:
        data = each.data(own)
        for name, value in each.metrics().items():
            key = (*data.items(), name)
            if each.step > weights_step or (key in last and last[key].step > each.step):
                continue
            entry = EvalResult(
                task_type=task,
                # The client groups results by type, not by name.
                dataset_type=data["type"] or re.sub(r"[^\w.-]+", "-", data["name"] or "unknown"),
                dataset_name=data["name"] or "unknown",
                dataset_config=data["config"],
                dataset_split=data["split"],
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=_plain(value),
            )
            last[key] = Result(entry, each.step, each.samples)
    return list(last.values())


def _plain(value: Any) -> Any:
    """`value` as YAML and JSON can say it; they have neither arrays nor, the latter, infinity and NaN."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, int | str) else str(value)


def cell(value: Any) -> str:
    """`value` in a Markdown table."""
    if isinstance(value, list):
        return f"[{', '.join(map(cell, value))}]"
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def curve(history: list[dict[str, Any]], found: list[Evaluation]) -> str:
    """A Markdown table of the run; empty where nothing was logged.

    A line for every step that was evaluated on the run's own data, with the training figures logged last since the line
    before; without evaluations, for every log line.
    """
    own = {id(each.line): each for each in found if each.name is not None}
    rows: dict[int, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    for line in history:
        if "loss" in line:
            training = {name: line[name] for name in TRAINING if name in line}
        evaluation = own.get(id(line))
        if evaluation is None and (own or "loss" not in line):
            continue
        step = evaluation.step if evaluation else line["step"]
        if step not in rows:
            rows[step], training = {"step": step, "epoch": line.get("epoch"), **training}, {}
        if evaluation:
            metrics = {f"{evaluation.prefix}_{name}": value for name, value in evaluation.metrics().items()}
            rows[step] |= {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return _table([rows[step] for step in sorted(rows)])


def _table(rows: list[dict[str, Any]]) -> str:
    stride = -(-len(rows) // MOST_ROWS)
    if stride > 1:
        rows = [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % stride == 0]
    names = [
        *TRAINING,
        *dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch", *TRAINING)),
    ]
    names = ["step", "epoch", *(name for name in names if any(name in row for row in rows))]
    if not rows:
        return ""
    table = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    table += [[cell(row.get(name)) for name in names] for row in rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return text if stride == 1 else f"{text}\n\nOf the logged lines, one in {stride} is shown."
