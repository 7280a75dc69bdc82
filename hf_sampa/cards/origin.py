"""What a model was made of, for its card: base model and data."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer

from . import evaluations
from .card_facts import CardFacts


def listed(value: str | list[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else value or []


def first(value: str | list[str] | None) -> str | None:
    return next(iter(listed(value)), None)


def base_model_of(trainer: Trainer, data: ModelCardData, told: str | None) -> str | None:
    """Name of the local folder that the model was loaded from, in which case `data` has no base model; else None."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A configuration names a model, too, whose weights this one never had.
    loaded = hasattr(model, "_weight_conversions")
    base = told or (model.config._name_or_path if loaded else None)
    if in_cache := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", f"{Path(base or '')}/"):
        base = in_cache[1].replace("--", "/")
    data.base_model = base if _is_repository(base) else None
    return Path(base).resolve().name if base and not data.base_model else None


def _is_repository(name: str | None) -> bool:
    """Whether `name` may be that of a repository on the Hub, and is none of a folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def dataset_of(trainer: Trainer, facts: CardFacts, data: ModelCardData) -> dict[str, str | None]:
    """Name, identifier, configuration and split of the evaluation data, as far as they are known."""
    own = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    known = [tag for tag in listed(data.datasets) if tag not in evaluations.FILES]
    data.datasets = known or None
    config = getattr(own, "config_name", None) if getattr(own, "builder_name", None) in known else None
    split = facts.dataset_split or evaluations.split_of(own, trainer)
    return {
        "name": " and ".join(listed(facts.dataset)) or first(known),
        "type": first(facts.dataset_tags) or first(known),
        "config": first(facts.dataset_args) or config,
        "split": split,
    }


def trained_on(
    trainer: Trainer, facts: CardFacts, data: ModelCardData, evaluated: dict[str, str | None]
) -> dict[str, str | None]:
    """Name and configuration of the training data: those of the evaluation data, unless it says otherwise; changes `data`."""
    own = trainer.train_dataset
    builder = getattr(own, "builder_name", None)
    if facts.dataset or not builder or builder in evaluations.FILES or builder == evaluated["name"]:
        return evaluated
    data.datasets = list(dict.fromkeys([builder, *listed(data.datasets)]))
    return {"name": builder, "config": own.config_name}


def origin(base_model: str | None, folder: str | None, dataset: dict[str, str | None]) -> str:
    config = (
        f" ({dataset['config']})" if dataset["config"] and dataset["config"] not in (dataset["name"] or "") else ""
    )
    data = f"{dataset['name'] or 'a data set that the run did not name'}{config}"
    if base_model:
        return f"This model is a fine-tuned version of [{base_model}](https://huggingface.co/{base_model}) on {data}."
    begun = f", starting from the model in the local folder `{folder}`" if folder else ""
    return f"This model was trained on {data}{begun}."
