"""Predictions of one's own texts: a CSV file with the row, what is predicted, and how probable each class is."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from outputs import sigmoid, softmax
from own_metric import decide
from own_problem import MULTI, REGRESSION

from hf_sampa.files import in_place_of


FILE = "predictions.csv"


def write_predictions(folder: Path, logits: np.ndarray, problem_type: str, names: Sequence[str]) -> Path:
    """Write ``predictions.csv`` into `folder`, and return its path.

    Its columns are ``index`` (the row's place among those that were predicted, from 0), ``prediction`` (a class, several with
    | between them, or a score), and for classes ``probability_<class>``.

    Args:
        folder: made if it is not there.
        logits: ``(num_examples, num_labels)``.
        problem_type: by transformers' name.
        names: of the model's classes in its order.

    Raises:
        ValueError: there is NaN among the logits.
    """
    decided = decide(logits, problem_type)
    header = ["index", "prediction"]
    if problem_type == REGRESSION:
        rows = [[f"{score:.6g}"] for score in decided]
    else:
        header += [f"probability_{name}" for name in names]
        probabilities = (sigmoid if problem_type == MULTI else softmax)(logits)
        words = [
            "|".join(name for name, has in zip(names, row, strict=True) if has)
            if problem_type == MULTI
            else names[row]
            for row in decided
        ]
        rows = [[word, *(f"{p:.6f}" for p in row)] for word, row in zip(words, probabilities, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    with in_place_of(folder / FILE) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *([index, *row] for index, row in enumerate(rows))])
    return folder / FILE
