"""Several processes with one voice."""

from __future__ import annotations

import logging

from datasets import disable_progress_bars
from transformers import TrainingArguments


def quiet_other_processes(training_args: TrainingArguments) -> None:
    """Leave warnings and progress bars to the main process, as Trainer does."""
    logging.basicConfig(level=logging.ERROR if training_args.process_index else logging.WARNING)
    if training_args.process_index or training_args.disable_tqdm:
        disable_progress_bars()
