"""The model that a script starts from: its own or new weights, its own or a new head, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .class_names import ClassNames, class_names
from .model_arguments import ModelArguments


logger = get_logger(__name__)

WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """The configuration that `args` name, as it is."""
    return AutoConfig.from_pretrained(args.config_name or args.model_name_or_path, **args.hub_arguments())


def load_model(
    auto_class: Any, args: ModelArguments, names: Sequence[str], **settings: Any
) -> tuple[PreTrainedModel, ClassNames]:
    """The model of `args` for the classes `names`, in fp32: half-precision weights would round SAM's perturbation away.

    New weights come from torch's global generator.

    Args:
        auto_class: as ``AutoModelForSequenceClassification``.
        args: which model.
        names: as for `class_names`.
        settings: further entries for the configuration, as ``problem_type``.

    Returns:
        The model, and which of its outputs is which class.

    Raises:
        ValueError: as `class_names`; or weights other than the head's are not in the model's files.
    """
    config = load_config(args)
    if is_without_weights(args.model_name_or_path):
        logger.warning(f"{args.model_name_or_path} holds no weights: the model is trained from scratch.")
        labels = class_names(config, names, new_head=True)
        config.update({**labels.config_entries(), **settings})
        return auto_class.from_config(config, dtype=torch.float32, trust_remote_code=args.trust_remote_code), labels
    labels = class_names(config, names, ignore_mismatched_sizes=args.ignore_mismatched_sizes)
    config.update({**labels.config_entries(), **settings})
    model = auto_class.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **args.hub_arguments(),
    )
    return model, labels


def is_without_weights(name_or_path: str) -> bool:
    """Whether it is a folder with a configuration alone, whose model starts from random weights."""
    folder = Path(name_or_path)
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in WEIGHTS)
