"""What a model says of images: its accuracy, and a table of its predictions."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

from hf_sampa.files import in_place_of


FILE = "predictions.csv"


def only_logits(outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
    """The logits ``(n, classes)``, of models that give more than these."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose largest logit, of ``(n, classes)``, is that of their label ``(n,)``."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float(accuracy_score(prediction.label_ids, predicted))}


def write_predictions(folder: Path, files: Sequence[str], logits: np.ndarray, names: Sequence[str]) -> Path:
    """Write ``predictions.csv`` into `folder`, and return its path.

    It has a row for each image: its ``file``, the ``prediction``, and for every class ``probability_<class>``.

    Args:
        folder: Made if it is not there.
        files: ``(n,)``, what the images are called.
        logits: ``(n, classes)``.
        names: ``(classes,)``, of the classes in the order of the logits.

    Raises:
        ValueError: There is NaN among the logits.
    """
    if np.isnan(logits).any():
        raise ValueError(
            f"{FILE}: expected a number for every class, got NaN from the model. Give --model_name_or_path one whose training "
            "did not diverge."
        )
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    folder.mkdir(parents=True, exist_ok=True)
    # The name of a file may be no UTF-8: its bytes stay as they are.
    with (
        in_place_of(folder / FILE) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file)
        table.writerow(["file", "prediction", *(f"probability_{name}" for name in names)])
        for name, row in zip(files, probabilities, strict=True):
            table.writerow([name, names[row.argmax()], *(f"{probability:.6f}" for probability in row)])
    return folder / FILE
