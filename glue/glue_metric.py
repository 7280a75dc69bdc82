"""GLUE's own metrics as an `evaluate.Metric`.

`evaluate.load("glue", ...)` fetches its script from the Hub; this one is a class to instantiate, so that it works
without a network. Metric names and values are the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import evaluate
import numpy as np
from datasets import Features, Value
from outputs import check_outputs
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tasks import TASKS, GlueTask
from transformers import EvalPrediction


logger = logging.getLogger(__name__)


def _correlation(statistic: Callable) -> Callable[[list[float], list[float]], float]:
    # scipy refuses a single pair of numbers; no correlation is defined for it, as for constant predictions (nan).
    return lambda references, predictions: (
        float(statistic(references, predictions).statistic) if len(references) > 1 else float("nan")
    )


METRICS: dict[str, Callable[[list, list], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0.0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


class GlueMetric(evaluate.Metric):
    """Metrics of one GLUE task: `GlueMetric("mrpc").compute(predictions=[0, 1], references=[0, 1])`.

    Predictions and references are class indices, or scores for "stsb". The result maps each of the task's metric names
    to a float: Matthews for CoLA, Pearson and Spearman for STS-B (nan where they are undefined, as for constant
    predictions), accuracy and the F1 of class 1 for MRPC and QQP, accuracy for the others.

    Args:
        config_name: one of the nine task names. Raises ValueError for another.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise ValueError(f"Expected a GLUE task among {', '.join(TASKS)}, got {self.config_name!r}.")
        value = Value("float32" if TASKS[self.config_name].is_regression else "int64")
        return evaluate.MetricInfo(
            description="GLUE's own metrics.",
            citation="Wang et al., GLUE, ICLR 2019, arXiv 1804.07461",
            inputs_description="predictions and references: class indices, or scores for stsb.",
            features=Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {name: float(METRICS[name](references, predictions)) for name in TASKS[self.config_name].metrics}


def make_compute_metrics(
    task: GlueTask, ids: Sequence[int] | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for Trainer, from logits of shape ``(num_examples, num_labels)`` (``num_labels`` is 1 for STS-B).

    It raises ValueError for logits with NaN, and takes a correlation that is undefined for 0, with a warning: nothing else can
    be compared with other epochs, or written to JSON.

    Args:
        task: which metrics.
        ids: the model's output for each of the task's labels; by default they are in the same order.
    """
    # In memory: the processes of a run would otherwise share one cache file.
    metric = GlueMetric(task.name, keep_in_memory=True)
    ids = list(range(len(task.labels) or 1) if ids is None else ids)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = check_outputs(prediction.predictions)[:, ids]
        if task.is_regression:
            return defined(metric.compute(predictions=logits[:, 0], references=prediction.label_ids))
        # F1 is of the task's class 1, whichever output of the model that is.
        references = np.argsort(ids)[prediction.label_ids]
        return metric.compute(predictions=np.argmax(logits, axis=-1), references=references)

    return compute_metrics


def defined(metrics: dict[str, float]) -> dict[str, float]:
    """0 in the place of NaN, with a warning."""
    undefined = [name for name, value in metrics.items() if math.isnan(value)]
    if undefined:
        logger.warning(
            "%s: undefined, since all predictions or all labels are the same; 0 is taken instead.",
            ", ".join(undefined),
        )
    return metrics | dict.fromkeys(undefined, 0.0)
