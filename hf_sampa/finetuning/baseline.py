"""Plain AdamW, to compare with: `Trainer` with the evaluation loss of SAMPa's."""

from __future__ import annotations

from transformers import Trainer

from ..evaluation import ExactEvalLoss


class BaselineTrainer(ExactEvalLoss, Trainer):
    """For ``--method adamw``: `Trainer`, whose `eval_loss` is the same on every number of processes."""
