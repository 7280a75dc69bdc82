"""The model that a script starts from: its own or new weights, its own or a new head, in fp32."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .class_names import ClassNames, class_names, has_names, listed
from .model_arguments import ModelArguments


logger = get_logger(__name__)

# What the models of a class are for.
CLASSIFIED = {AutoModelForSequenceClassification: "texts", AutoModelForImageClassification: "images"}
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def load_config(auto_class: Any, args: ModelArguments) -> PreTrainedConfig:
    """The configuration that `args` name, as it is. Ask for it before all else that belongs to the model.

    Args:
        auto_class: one of `CLASSIFIED`.
        args: which model.

    Raises:
        ValueError: there is no such folder, or the model is not for `auto_class`.
    """
    args.check_folders()
    option = "model_name_or_path" if args.config_name is None else "config_name"
    name = getattr(args, option)
    config = AutoConfig.from_pretrained(name, **args.hub_arguments())
    if not _takes(auto_class, config):
        others = [f"one for {what}, " for other, what in CLASSIFIED.items() if _takes(other, config)]
        raise ValueError(
            f"--{option}: expected a model for {CLASSIFIED[auto_class]}, got {name}, {''.join(others)}of type "
            f"{config.model_type}. Name another one."
        )
    return config


def _takes(auto_class: Any, config: PreTrainedConfig) -> bool:
    """Whether `auto_class` has a model of this configuration, in transformers or in the model's own code."""
    own_code = getattr(config, "auto_map", None) or {}
    return type(config) in auto_class._model_mapping or auto_class.__name__ in own_code


def load_model(
    auto_class: Any, args: ModelArguments, names: Sequence[str], **settings: Any
) -> tuple[PreTrainedModel, ClassNames]:
    """The model of `args` for the classes `names`, in fp32: half-precision weights would round SAM's perturbation away.

    New weights come from torch's global generator.

    Args:
        auto_class: one of `CLASSIFIED`.
        args: which model.
        names: as for `class_names`.
        settings: further entries for the configuration; without a ``problem_type``, the model goes by its labels.

    Returns:
        The model, and which of its outputs is which class.

    Raises:
        ValueError: as `load_config` and `class_names`; or weights other than the head's are not in the model's files.
    """
    config = load_config(auto_class, args)
    own = copy.deepcopy(config)
    random = is_without_weights(args.model_name_or_path)
    labels = class_names(config, names, new_head=random, ignore_mismatched_sizes=args.ignore_mismatched_sizes)
    config.update({"problem_type": None, **labels.config_entries(), **settings})
    if random:
        logger.warning(f"{args.model_name_or_path} holds no weights: the model is trained from scratch.")
        return auto_class.from_config(config, dtype=torch.float32, trust_remote_code=args.trust_remote_code), labels
    with _report_if_taken():
        model, report = auto_class.from_pretrained(
            args.model_name_or_path,
            config=config,
            dtype=torch.float32,
            # What differs is reported, and looked at below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **args.hub_arguments(),
        )
        mismatched = {name for name, *_ in report["mismatched_keys"]}
        new = mismatched | set(report["missing_keys"])
        _check_lost(model, new, args.model_name_or_path)
        if mismatched and not args.ignore_mismatched_sizes:
            raise ValueError(
                f"--model_name_or_path: expected a model for the {len(names)} classes of the data, {listed(names)}, or one without a "
                f"head, got one for {len(own.id2label)}. Add --ignore_mismatched_sizes to train a new head in the place of its own."
            )
    head = _head(auto_class, model) - new
    if labels.new_head and head:
        _renew(auto_class, model, head)
    if labels.new_head and (head or mismatched):
        logger.warning(
            f"--ignore_mismatched_sizes: {args.model_name_or_path} gets a new head for {listed(names)}; its own, for "
            f"{listed(own.id2label.values())}, is left out."
        )
    elif head and not has_names(own) and len(names) > 1:
        logger.warning(
            f"The classes of {args.model_name_or_path} have no names: they are taken to be those of the data, in this order: "
            f"{listed(names)}."
        )
    return model, replace(labels, new_head=labels.new_head or not head)


@contextmanager
def _report_if_taken() -> Iterator[None]:
    """Upstream's table of what it loaded reads as if the run went on: it is shown where the block does not refuse the model."""
    log, held = logging.getLogger(PreTrainedModel.__module__), []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    log.addFilter(hold)
    try:
        yield
    except ValueError:
        held.clear()
        raise
    finally:
        log.removeFilter(hold)
        for record in held:
            log.handle(record)


def is_without_weights(name_or_path: str) -> bool:
    """Whether it is a folder with a configuration alone, whose model starts from random weights."""
    folder = Path(name_or_path)
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in WEIGHTS)


def _check_lost(model: PreTrainedModel, new: set[str], name_or_path: str) -> None:
    """Raise ValueError if weights below the head would start at random; a pooler belongs to the head, and is often left out."""
    lost = sorted(name for name in new if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name)
    if lost:
        raise ValueError(
            f"--model_name_or_path {name_or_path}: expected every weight but the head's, but {len(lost)} would start at random, "
            f"among them {lost[0]}. Name a checkpoint of this very architecture, or a folder with its config alone to train it from "
            "scratch."
        )


def _head(auto_class: Any, model: PreTrainedModel) -> set[str]:
    """Names of the parameters whose shape depends on the number of classes."""
    more = copy.deepcopy(model.config)
    more.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in auto_class.from_config(more).named_parameters()}
    return {name for name, parameter in model.named_parameters() if parameter.shape != shapes[name]}


@torch.no_grad()
def _renew(auto_class: Any, model: PreTrainedModel, names: set[str]) -> None:
    """Give the parameters `names` the values that they have in a new model."""
    new = auto_class.from_config(model.config, dtype=torch.float32)
    for name in sorted(names):
        model.get_parameter(name).copy_(new.get_parameter(name))
