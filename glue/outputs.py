"""What comes out of a model: the one array of scores, and whether they can mean anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def first_output(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` for Trainer: some models return hidden states, too, which need not be kept."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check_outputs(logits: np.ndarray) -> np.ndarray:
    """`logits` as they are: argmax would take NaN for a class.

    Raises:
        ValueError: there is NaN among them.
    """
    broken = int(np.isnan(logits).any(axis=-1).sum())
    if broken:
        raise ValueError(
            f"Expected numbers from the model, got NaN for {broken} of {len(logits)} examples. Its weights are broken, or the "
            "training diverged: try a smaller --learning_rate, or --bf16 in the place of --fp16."
        )
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes of which one is right, ``(num_examples, num_classes)``."""
    return torch.from_numpy(logits).double().softmax(-1).numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes of which several may be right."""
    return torch.from_numpy(logits).double().sigmoid().numpy()
