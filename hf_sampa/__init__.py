"""Sharpness-aware minimization at the price of AdamW, for `transformers.Trainer`."""

from .diagnostics import DiagnosticsCallback
from .trainer import SAMPaMixin, SAMPaTrainer
from .training_args import SAMPaArgumentsMixin, SAMPaTrainingArguments


__all__ = ["DiagnosticsCallback", "SAMPaArgumentsMixin", "SAMPaMixin", "SAMPaTrainer", "SAMPaTrainingArguments"]
__version__ = "0.1.0"
