"""Checkpoints of a model that FSDP2 has sharded, in the form of any other: weights and optimizer state are whole in them.

Then a run with FSDP goes on from one without, and the reverse, on any number of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as upstream
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from ..distributed import part_of, plain_name, spread_as, units
from ..state import stood_in
from . import dcp
from .in_parts import holds_parts, reading_parts


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded model, whole, on the CPU of rank 0; nothing on the others. A collective."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def as_any_other(trainer: Trainer) -> Iterator[None]:
    """Within the block Trainer saves and loads a sharded model as it does any other."""
    model = trainer.model
    if not units(model):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(stood_in(trainer, "is_fsdp_enabled", False))
        stack.enter_context(stood_in(model, "load_state_dict", partial(_load_in_parts, model, model.load_state_dict)))
        yield


def _load_in_parts(
    model: nn.Module, load: Callable[..., Any], state: dict[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Load a state dict of whole tensors, of each of which this process takes what it holds."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    own = {plain_name(name): tensor for name, tensor in named}
    parts = {
        name: spread_as(own[name], part_of(value, own[name]))
        if name in own and value.shape == own[name].shape
        else value
        for name, value in state.items()
    }
    return load(parts, strict=strict, assign=assign)


@contextmanager
def as_saved(trainer: Trainer, folder: str) -> Iterator[None]:
    """Within the block Trainer loads the weights in `folder` as they were saved: in parts, or as those of any other model."""
    with reading_parts(trainer) if holds_parts(folder, dcp.MODEL) else as_any_other(trainer):
        yield


@contextmanager
def optimizer_as_saved(trainer: Trainer, checkpoint: str | None) -> Iterator[None]:
    """Within the block Trainer loads the optimizer of a sharded model, in parts or from a whole ``optimizer.pt``, without a whole one on any device."""
    if checkpoint is not None and holds_parts(checkpoint, dcp.OPTIMIZER):
        with reading_parts(trainer):
            yield
        return
    if not units(trainer.model) or checkpoint is None or not (Path(checkpoint) / OPTIMIZER_NAME).is_file():
        yield
        return

    def load(plugin, accelerator, optimizer, model, folder, *args, **kwargs) -> None:
        _load_optimizer(optimizer, Path(folder) / OPTIMIZER_NAME)

    with (
        stood_in(trainer, "is_fsdp_enabled", True),
        stood_in(trainer.accelerator.state, "fsdp_plugin", getattr(trainer.accelerator.state, "fsdp_plugin", None)),
        stood_in(upstream, "load_fsdp_optimizer", load),
    ):
        yield


def _load_optimizer(optimizer: Optimizer, file: Path) -> None:
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def part(i: int, value: Any) -> Any:
        of_weights = isinstance(value, torch.Tensor) and i < len(params) and value.shape == params[i].shape
        return spread_as(params[i], part_of(value, params[i]).clone()) if of_weights else value

    state = {i: {name: part(i, value) for name, value in each.items()} for i, each in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})
