"""Predictions in the format of gluebenchmark.com: a file for each test set, ``index<TAB>prediction``.

The site takes a zip archive of the files of all tasks. Classes are words or digits, as in the task's own files; the scores of
STS-B are cut to 0..5.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from outputs import check_outputs
from tasks import GlueTask

from hf_sampa.files import in_place_of


logger = logging.getLogger(__name__)


def predictions_of(logits: np.ndarray, task: GlueTask, ids: Sequence[int]) -> list[str]:
    """What the submission says of each row.

    Args:
        logits: of the model, ``(num_examples, num_labels)``.
        task: whose test set it is.
        ids: the model's output for each of the task's labels.

    Raises:
        ValueError: there is NaN among them.
    """
    logits = check_outputs(logits)[:, list(ids)]
    if task.is_regression:
        return [f"{score:.3f}" for score in np.clip(logits[:, 0], *task.score_range)]
    return [task.spellings[index] for index in logits.argmax(-1)]


def write_submission(folder: Path, split: str, task: GlueTask, indices: Sequence[int], predictions: list[str]) -> Path:
    """Write the file of one test set into `folder`, and return its path."""
    path = folder / task.submissions[split]
    folder.mkdir(parents=True, exist_ok=True)
    with in_place_of(path) as partial:
        lines = [f"{index}\t{prediction}\n" for index, prediction in zip(indices, predictions, strict=True)]
        partial.write_text("".join(["index\tprediction\n", *lines]), encoding="utf-8")
    return path
