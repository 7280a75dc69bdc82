"""How a model that was trained here is loaded by those who do not have this package."""

from __future__ import annotations

from typing import Any

from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.models.auto import modeling_auto

from ..distributed import class_of


PROCESSORS = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    BaseImageProcessor: "AutoImageProcessor",
    ProcessorMixin: "AutoProcessor",
}
# Where several classes load a model: the one for what it is used for, and not for how it was pretrained.
FIRST, LAST = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), ("AutoModelForPreTraining", "AutoModel")


def loading_of(trainer: Trainer) -> dict[str, str] | None:
    """What loads the model, and what prepares its inputs, without this package; None where nothing does."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if hasattr(model, "get_base_model"):  # peft's; a model with adapters of transformers' own is an AutoModel
        found = {"library": "peft", "model_class": f"Auto{class_of(model).__name__}"}
    elif auto := _auto_class(model):
        found = {"library": "transformers", "model_class": auto}
    else:
        return None
    for kind, name in PROCESSORS.items():
        if isinstance(trainer.processing_class, kind):
            return {**found, "processor_class": name}
    return found


def _auto_class(model: Any) -> str | None:
    """Name of the class whose ``from_pretrained`` makes such a model; None where none does."""
    names = [name for name in dir(modeling_auto) if name.startswith("AutoModelFor") and name not in FIRST + LAST]
    for name in (*FIRST, *names, *LAST):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", {})
        kind = type(getattr(model, "config", None))
        if kind in mapping and class_of(model) in (
            mapping[kind] if isinstance(mapping[kind], tuple) else (mapping[kind],)
        ):
            return name
    return None
