"""Wrong labels among the training rows."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, DatasetDict, Value

from hf_sampa.finetuning import corrupt_labels


# Every run has the same wrong labels, whatever its seed and method: runs are compared on the same data.
_DRAW = 0


def with_noise(data: DatasetDict, share: float) -> DatasetDict:
    """`data` with a share of the labels of "train" replaced by other classes, see `corrupt_labels`; all else as it is.

    Raises:
        ValueError: `share` is out of range, or the labels are no classes of which a text has one.
    """
    if not share or "train" not in data:
        return data
    rows = data["train"]
    label = rows.features["label"]
    if not isinstance(label, ClassLabel):
        got = "scores" if isinstance(label, Value) else "several labels for one text"
        raise ValueError(
            f"--label_noise: expected one class for each text, of which another is a wrong one, got {got}. Leave --label_noise out."
        )
    wrong = corrupt_labels(np.array(rows["label"][:]), share, label.num_classes, _DRAW)
    return DatasetDict({**data, "train": rows.remove_columns("label").add_column("label", wrong, feature=label)})
