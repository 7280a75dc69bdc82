"""Plain AdamW, to compare with: `Trainer` with SAMPa's card and evaluation loss."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ..cards import WithCard
from ..evaluation import ExactEvalLoss


class BaselineTrainer(ExactEvalLoss, WithCard, Trainer):
    """For ``--method adamw``: `Trainer`, whose `eval_loss` is the same on every number of processes, and its card true."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # What cards ask a trainer for; all that SAMPa's do besides, this one does not.
        self.continued: list[str] = []
        self.seconds_per_step = self.sampa = self._recipe = None

    def unlogged_means(self) -> dict[str, float]:
        """As in `SAMPaMixin`: none."""
        return {}
