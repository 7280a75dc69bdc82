"""Wrong labels among those that are trained on, for comparisons of methods."""

from __future__ import annotations

import numpy as np


def corrupt_labels(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
    """Symmetric label noise (SAMPa paper, section 5.4 and Table 7).

    ``round(share * n)`` labels, drawn without replacement, are each replaced by one drawn uniformly from the *other*
    classes, so that exactly this share is wrong afterwards. Where a draw may return the true label, as in some papers, a
    share of 0.4 leaves 0.36 of CIFAR-10's labels wrong.

    Args:
        labels: True labels ``(n,)``, n > 0, from 0 to `num_classes` - 1. Left as they are.
        share: Share of labels to corrupt, in [0, 1).
        num_classes: Number of classes, at least 2.
        seed: Which labels are corrupted, and how, depends on this and on nothing else.

    Raises:
        ValueError: `share` or a label is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"--label_noise: expected a share of the training labels in [0, 1), got {share}.")
    low, high = np.min(labels), np.max(labels)
    if low < 0 or high >= num_classes:
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, got {low} to {high}.")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    corrupted = np.array(labels)
    # A shift by 1 to C - 1 classes, round the circle of labels, reaches every other class with the same probability.
    shifts = generator.integers(1, num_classes, size=len(chosen))
    corrupted[chosen] = (corrupted[chosen] + shifts) % num_classes
    return corrupted
