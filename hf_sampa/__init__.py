"""Sharpness-aware minimization at the price of AdamW, for `transformers.Trainer`."""

from .trainer import SAMPaMixin, SAMPaTrainer
from .training_args import SAMPaArgumentsMixin, SAMPaTrainingArguments


__all__ = ["SAMPaArgumentsMixin", "SAMPaMixin", "SAMPaTrainer", "SAMPaTrainingArguments"]
__version__ = "0.1.0"
