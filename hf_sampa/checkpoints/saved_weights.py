"""Weights as a checkpoint has them: a number that says which they are, and loading them to the last tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..distributed import class_of, plain_name, whole
from ..state import fingerprint_of_bits
from .manifest import Weights


logger = get_logger(__name__)


def record(model: nn.Module, trained: Iterable[str]) -> dict[str, Any]:
    """What `holds` compares with: names of the trained parameters and of buffers that are saved, and a fingerprint of them."""
    left = left_out(model)
    names = [name for name in (*trained, *_saved_buffers(model)) if name not in left]
    return {"names": names, "fingerprint": _fingerprint(model, names)}


def holds(model: nn.Module, recorded: Weights) -> bool:
    """Whether `model` holds, to the last bit, the weights that `record` saw."""
    return _fingerprint(model, recorded.names) == recorded.fingerprint


def left_out(model: nn.Module) -> set[str]:
    """Names of tensors that `model` says are not to be saved."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def _saved_buffers(model: nn.Module) -> list[str]:
    if hasattr(model, "peft_config"):  # adapters are saved without the buffers of what they adapt
        return []
    saved = model.state_dict().keys()
    return [
        name
        for name, buffer in ((plain_name(name), buffer) for name, buffer in model.named_buffers())
        if name in saved and buffer.layout is torch.strided and not is_traceable_wrapper_subclass(buffer)
    ]


def _fingerprint(model: nn.Module, names: list[str]) -> int | None:
    """None where the model lacks one of them."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    tensors = {plain_name(name): tensor for name, tensor in named}
    if not tensors.keys() >= set(names):
        return None
    # Two models with the same numbers may have them in another order in memory.
    return int(fingerprint_of_bits(whole(tensors[name].detach()).contiguous() for name in names))


def contiguous(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as safetensors takes it: a transposed weight is one that Trainer would not save."""
    return {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def other_model(model: nn.Module, folder: str) -> str | None:
    """What to say of weights that do not fit, where the configuration beside them is of another class or number of classes."""
    file = Path(folder) / CONFIG_NAME
    if not isinstance(model, PreTrainedModel) or not file.is_file():
        return None
    saved = PreTrainedConfig.from_json_file(file)
    then, now = saved.architectures or [saved.model_type], [class_of(model).__name__]
    if then == now:
        then, now = ([f"{now[0]} of {config.num_labels} classes"] for config in (saved, model.config))
    if then == now:
        return None
    return (
        f"The weights in {folder} are of another model: expected {now[0]}, but it holds a {then[0]}. Resume with the model that "
        "wrote it, or start a new run, which takes its weights as far as they fit, from this folder as its model."
    )


def load_every_tensor(model: nn.Module, folder: str) -> None:
    """Load the weights in `folder` into `model` by way of `from_pretrained`, which knows renamed keys and tied weights.

    Upstream loads by ``load_state_dict(strict=False)`` and only warns (transformers #43701, #48805): for ViT, whose
    keys are renamed on saving, most tensors would silently stay as they were. What `left_out` names stays as it is.

    Raises ValueError where any other tensor of the model or of the folder has no counterpart.
    """
    problems: dict[str, Any] = {"reason": "the model is no PreTrainedModel, and its keys differ from the file's"}
    if isinstance(model, PreTrainedModel):
        loaded, info = _accounting(class_of(model)).from_pretrained(
            folder, config=model.config, dtype=torch.float32, output_loading_info=True
        )
        info["missing_keys"] = (info["missing_keys"] | loaded.passed_over) - left_out(model)
        problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise ValueError(
            other_model(model, folder)
            or f"Expected every tensor of the model in {folder}, and none besides, but got {problems}. These are weights "
            "of another model; load them into the one that wrote them."
        )
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name not in left_out(model)}
    model.load_state_dict(state, strict=False)
    logger.info(f"Loaded all {len(state)} tensors of {folder} by way of from_pretrained.")


def _accounting(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`kind`, whose models remember, as `passed_over`, which missing tensors `from_pretrained` says nothing of."""

    class Accounting(kind):
        passed_over: frozenset[str] = frozenset()

        def _adjust_missing_and_unexpected_keys(self, loading_info):
            missing = set(loading_info.missing_keys)
            super()._adjust_missing_and_unexpected_keys(loading_info)
            self.passed_over = frozenset(missing - loading_info.missing_keys)

    # transformers looks up which keys it renames by the name of the class.
    Accounting.__name__, Accounting.__qualname__, Accounting.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return Accounting
