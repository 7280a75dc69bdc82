"""What one's own data are scored with: scikit-learn's and scipy's metrics by name, or any of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import evaluate
import numpy as np
from glue_metric import METRICS, defined
from outputs import check_outputs
from own_problem import MULTI, REGRESSION, SINGLE
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    mean_squared_error,
    precision_score,
    r2_score,
    recall_score,
)
from transformers import EvalPrediction


Metric = Callable[[Any, Any], float]

# By type of the problem, the first ones of which are taken unless others are named. A mean over the classes is macro, one over
# all single decisions is micro.
OWN_METRICS: dict[str, dict[str, Metric]] = {
    SINGLE: {
        "accuracy": accuracy_score,
        "f1_macro": partial(f1_score, average="macro", zero_division=0.0),
        "f1_micro": partial(f1_score, average="micro", zero_division=0.0),
        "precision_macro": partial(precision_score, average="macro", zero_division=0.0),
        "recall_macro": partial(recall_score, average="macro", zero_division=0.0),
        "balanced_accuracy": balanced_accuracy_score,
        "matthews_correlation": matthews_corrcoef,
    },
    MULTI: {
        "f1_micro": partial(f1_score, average="micro", zero_division=0.0),
        "f1_macro": partial(f1_score, average="macro", zero_division=0.0),
        "precision_micro": partial(precision_score, average="micro", zero_division=0.0),
        "recall_micro": partial(recall_score, average="micro", zero_division=0.0),
        "exact_match": accuracy_score,
    },
    REGRESSION: {
        "mse": mean_squared_error,
        "pearson": METRICS["pearson"],
        "mae": mean_absolute_error,
        "r2": r2_score,
        "spearmanr": METRICS["spearmanr"],
    },
}
_BY_DEFAULT = 2
# Of which transformers would take the greatest for the best.
LESS_IS_BETTER = ("mse", "mae")


def find_metrics(
    problem_type: str, names: str | None, cache_dir: str | None = None
) -> dict[str, Metric | evaluate.Metric]:
    """The metrics to score with, by name.

    Args:
        problem_type: by transformers' name.
        names: with a comma between them; one that is not in `OWN_METRICS` is loaded by `evaluate`, from the Hub or a path.
        cache_dir: where `evaluate` keeps what it loads.

    Raises:
        ValueError: there is no such metric.
    """
    own = OWN_METRICS[problem_type]
    wanted = list(own)[:_BY_DEFAULT] if names is None else [name.strip() for name in names.split(",")]
    found: dict[str, Metric | evaluate.Metric] = {}
    for name in wanted:
        try:
            found[name] = own.get(name) or evaluate.load(name, cache_dir=cache_dir, keep_in_memory=True)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"--metric_name: expected {', '.join(own)} (for {problem_type}), or a metric that evaluate.load finds on the Hub or "
                f"in a folder, got {name!r}. Give one of these, or several with a comma between them."
            ) from error
    return found


def decide(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """What the outputs ``(num_examples, num_labels)`` say: a score or a class for each example, or for each class 1 or 0.

    Raises:
        ValueError: there is NaN among them.
    """
    logits = check_outputs(logits)
    if problem_type == REGRESSION:
        return logits[:, 0]
    # A probability above one half.
    return (logits > 0).astype(int) if problem_type == MULTI else logits.argmax(-1)


def make_compute_metrics(
    problem_type: str, metrics: dict[str, Metric | evaluate.Metric]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for Trainer, with what `find_metrics` found."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        decided, labels = decide(prediction.predictions, problem_type), prediction.label_ids
        if problem_type == MULTI:
            labels = labels.astype(int)
        return defined(_score(metrics, labels, decided))

    return compute_metrics


def score_names(problem_type: str, metrics: dict[str, Metric | evaluate.Metric], labels: Sequence) -> list[str]:
    """What the scores that `metrics` give are called.

    Args:
        problem_type: by transformers' name.
        metrics: as `find_metrics` found them. Those of `evaluate` do not tell before they have scored something.
        labels: of the examples to score, which such metrics are given as predictions, too.
    """
    of_evaluate = {name: each for name, each in metrics.items() if isinstance(each, evaluate.EvaluationModule)}
    right = np.asarray(labels)
    right = right.astype(int) if problem_type == MULTI else right
    return [*(name for name in metrics if name not in of_evaluate), *_score(of_evaluate, right, right)]


def _score(metrics: dict[str, Metric | evaluate.Metric], labels: np.ndarray, decided: np.ndarray) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, metric in metrics.items():
        if isinstance(metric, evaluate.EvaluationModule):
            scores |= metric.compute(predictions=decided, references=labels)
        else:
            scores[name] = float(metric(labels, decided))
    return scores


def metric_names(problem_types: Sequence[str] = (SINGLE, MULTI, REGRESSION)) -> str:
    """For the help text: what can be named for each type."""
    return "; ".join(f"{kind}: {', '.join(OWN_METRICS[kind])}" for kind in problem_types)
