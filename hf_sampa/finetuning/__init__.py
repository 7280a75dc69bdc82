"""What a script needs around the trainer to compare SAMPa, SAM and plain AdamW: settings, command line, model, the run itself.

glue/ and vit_finetune/ are made with it; nothing else in this package uses it.
"""

from .baseline import BaselineTrainer
from .class_names import ClassNames, check_trained, class_names, same_names
from .command_line import UNUSED, FineTuningParser, parse_arguments
from .label_noise import corrupt_labels
from .model_arguments import ModelArguments
from .models import is_without_weights, load_config, load_model
from .script import run_main
from .training_arguments import FineTuningArguments
from .whole_run import train_and_score


__all__ = [
    "UNUSED",
    "BaselineTrainer",
    "ClassNames",
    "FineTuningArguments",
    "FineTuningParser",
    "ModelArguments",
    "check_trained",
    "class_names",
    "corrupt_labels",
    "is_without_weights",
    "load_config",
    "load_model",
    "parse_arguments",
    "run_main",
    "same_names",
    "train_and_score",
]
