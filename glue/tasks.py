"""The nine GLUE tasks: what they hold, where their data is, what they are scored with, the paper's settings.

Column names and labels are those of the dataset `nyu-mll/glue` on the Hub; `tsv_columns` says what the same columns are
called in the official `train.tsv`, `dev.tsv` and `test.tsv`. Wang et al., "GLUE", ICLR 2019 (arXiv 1804.07461).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Features, Value


HUB_DATASET = "nyu-mll/glue"

# GLUE's diagnostic set: predicted with a model of MNLI, and a configuration of its own on the Hub.
DIAGNOSTIC = "ax"

# SAMPa, arXiv 2410.10683, section 5.3, for BERT-base. `batch_size` counts the examples of one update, over all processes.
PAPER_SETTINGS = {
    "batch_size": 32,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "num_train_epochs": 3,
    "rho": 0.05,
    "lmbda": 0.1,
}


class TaskName(str):
    """A task as the Hub spells it, from any spelling: ``sst2`` from ``SST-2``."""

    def __new__(cls, text: str) -> TaskName:
        return super().__new__(cls, re.sub(r"[\W_]", "", text).lower())


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task.

    Args:
        name: the task's name on the Hub and on the command line.
        tsv_columns: official TSV column of each text column, keyed by the Hub's name, in the order the model reads them.
        tsv_label: official TSV column of the label.
        labels: class names in the Hub's order; empty for a regression.
        metrics: names of GLUE's metrics for this task, as `glue_metric.py` spells them.
        submissions: file of the predictions, as gluebenchmark.com names it, of each split to predict.
        labels_as_words: whether the official files spell the classes out instead of numbering them.
        score_range: smallest and largest score of a regression.
        tsv_header: columns of official files that have no header row.
        has_broken_rows: whether the official files hold rows cut short by a line break inside a field.
        dev_files: official file of each evaluation split, keyed by the Hub's name of the split.
        tsv_index: official column that numbers the rows to predict.
        settings: where the paper's settings for this task differ from `PAPER_SETTINGS`.
    """

    name: str
    tsv_columns: dict[str, str]
    tsv_label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    submissions: dict[str, str]
    labels_as_words: bool = False
    score_range: tuple[float, float] | None = None
    tsv_header: tuple[str, ...] | None = None
    has_broken_rows: bool = False
    dev_files: dict[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})
    tsv_index: str = "index"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def spellings(self) -> tuple[str, ...]:
        """How the official files, and those of predictions, write each class."""
        return self.labels if self.labels_as_words else tuple(str(index) for index in range(len(self.labels)))

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The Hub's names of the one or two text columns."""
        return tuple(self.tsv_columns)

    @property
    def files(self) -> dict[str, str]:
        """Official file of each split that carries labels."""
        return {"train": "train.tsv", **self.dev_files}

    @property
    def test_files(self) -> dict[str, str]:
        """Official file of each split to predict; that of the diagnostic set need not be there."""
        return {split: "diagnostic.tsv" if split == DIAGNOSTIC else f"{split}.tsv" for split in self.submissions}

    @property
    def features(self) -> Features:
        """Types of the columns of labelled splits, as on the Hub (without `idx`)."""
        label = Value("float32") if self.is_regression else ClassLabel(names=list(self.labels))
        return Features({**{column: Value("string") for column in self.text_columns}, "label": label})

    @property
    def test_features(self) -> Features:
        """Types of the columns of splits to predict, as on the Hub (without `label`)."""
        return Features({**{column: Value("string") for column in self.text_columns}, "idx": Value("int32")})

    @property
    def paper_settings(self) -> dict[str, Any]:
        """Training arguments of the paper for this task, by field name."""
        return {**PAPER_SETTINGS, **self.settings}


TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            {"sentence": "sentence"},
            "label",
            labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            submissions={"test": "CoLA.tsv"},
            tsv_header=("source", "label", "star", "sentence"),
            settings={"rho": 0.01},
        ),
        GlueTask(
            "sst2",
            {"sentence": "sentence"},
            "label",
            labels=("negative", "positive"),
            metrics=("accuracy",),
            submissions={"test": "SST-2.tsv"},
        ),
        GlueTask(
            "mrpc",
            {"sentence1": "#1 String", "sentence2": "#2 String"},
            "Quality",
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            submissions={"test": "MRPC.tsv"},
            settings={"num_train_epochs": 5},
        ),
        GlueTask(
            "stsb",
            {"sentence1": "sentence1", "sentence2": "sentence2"},
            "score",
            labels=(),
            metrics=("pearson", "spearmanr"),
            submissions={"test": "STS-B.tsv"},
            score_range=(0.0, 5.0),
            settings={"rho": 0.005},
        ),
        GlueTask(
            "qqp",
            {"question1": "question1", "question2": "question2"},
            "is_duplicate",
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            submissions={"test": "QQP.tsv"},
            has_broken_rows=True,
            tsv_index="id",
        ),
        GlueTask(
            "mnli",
            {"premise": "sentence1", "hypothesis": "sentence2"},
            "gold_label",
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            labels_as_words=True,
            dev_files={"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
            submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", DIAGNOSTIC: "AX.tsv"},
        ),
        GlueTask(
            "qnli",
            {"question": "question", "sentence": "sentence"},
            "label",
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
            submissions={"test": "QNLI.tsv"},
            labels_as_words=True,
        ),
        GlueTask(
            "rte",
            {"sentence1": "sentence1", "sentence2": "sentence2"},
            "label",
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
            submissions={"test": "RTE.tsv"},
            labels_as_words=True,
            settings={"rho": 0.005},
        ),
        GlueTask(
            "wnli",
            {"sentence1": "sentence1", "sentence2": "sentence2"},
            "label",
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
            submissions={"test": "WNLI.tsv"},
            settings={"num_train_epochs": 5},
        ),
    )
}
