"""What a model says of images: its accuracy, and a table of its predictions."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction


FILE = "predictions.csv"


def only_logits(outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
    """The logits ``(n, classes)``, of models that give more than these."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose largest logit, of ``(n, classes)``, is that of their label ``(n,)``."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float(accuracy_score(prediction.label_ids, predicted))}


def write_predictions(path: Path, files: Sequence[str], logits: np.ndarray, names: Sequence[str]) -> None:
    """Write a row for each image: its file, the class that is predicted, and the probability of every class.

    Args:
        path: Of the table, in UTF-8 with commas.
        files: ``(n,)``, what the images are called.
        logits: ``(n, classes)``.
        names: ``(classes,)``, of the classes in the order of the logits.
    """
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    # The name of a file may be no UTF-8: its bytes stay as they are.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "predicted", *(f"probability of {name}" for name in names)])
        for name, row in zip(files, probabilities, strict=True):
            table.writerow([name, names[row.argmax()], *(f"{share:.6g}" for share in row)])
