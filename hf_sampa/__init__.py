"""Sharpness-aware minimization at the price of AdamW, for `transformers.Trainer`."""

import sys

# compat first: it refuses versions that the others would fail with.
from . import compat, distributed, variants  # noqa: F401
from .monitoring import DiagnosticsCallback
from .trainer import SAMPaMixin, SAMPaTrainer
from .training_args import SAMPaArgumentsMixin, SAMPaTrainingArguments


__all__ = ["DiagnosticsCallback", "SAMPaArgumentsMixin", "SAMPaMixin", "SAMPaTrainer", "SAMPaTrainingArguments"]
__version__ = "0.1.0"

# Names that modules had before they had rooms.
sys.modules |= {
    f"{__name__}.recipe": variants.recipe,
    f"{__name__}.parts": variants.parts,
    f"{__name__}.exchange": distributed.exchange,
}
