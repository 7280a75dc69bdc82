"""What a run starts with on one process, to be compared with the others before the first step."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sized
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.trainer_utils import has_length

from .started import versions


if TYPE_CHECKING:
    from .trainer import SAMPaMixin

# Settings that may differ between processes: where each one writes, what it shows, and which it is.
OWN = {
    *("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica"),
    *("local_rank", "hub_token", "push_to_hub", "hub_model_id", "debug", "deepspeed_plugin", "fsdp_plugin_args"),
    *("project", "trackio_space_id", "accelerator_config", "distributed_state", "data_seed_worker"),
}


def started_with(trainer: SAMPaMixin, max_steps: int) -> dict[str, Any]:
    """Plain values by name: settings, data, model, optimizer and versions of packages, equal on all processes of a run."""
    return {
        **{name: value for name, value in _settings(trainer.args).items()},
        "max_steps of this run": max_steps,
        **_sizes(trainer),
        **_model(trainer),
        **_optimizer(trainer.optimizer.optimizer),
        **{f"version of {name}": version for name, version in versions().items()},
        "machine": platform.machine(),
    }


def _settings(args: Any) -> dict[str, Any]:
    fields = [each.name for each in dataclasses.fields(args) if each.name not in OWN and not each.name.startswith("_")]
    return {name: _plain(getattr(args, name)) for name in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _sizes(trainer: SAMPaMixin) -> dict[str, Any]:
    data = {
        "train_dataset": trainer.train_dataset,
        "eval_dataset": trainer.eval_dataset,
        "train batches": trainer._loader,
    }
    return {
        f"length of {name}": len(each) for name, each in data.items() if isinstance(each, Sized) and has_length(each)
    }


def _model(trainer: SAMPaMixin) -> dict[str, Any]:
    found: dict[str, Any] = {"class of the model": type(trainer.model).__name__}
    for name, param in trainer.model.named_parameters():
        found[f"parameter {name}"] = f"{list(param.shape)} {param.dtype}{'' if param.requires_grad else ' frozen'}"
    for name, buffer in trainer.model.named_buffers():
        found[f"buffer {name}"] = f"{list(buffer.shape)} {buffer.dtype}"
    return found


def _optimizer(optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"class of the optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}"}
    for i, group in enumerate(optimizer.param_groups):
        found[f"parameters in optimizer group {i}"] = [list(param.shape) for param in group["params"]]
        for name, value in group.items():
            if name != "params":
                found[f"{name} of optimizer group {i}"] = value.item() if _is_number(value) else _plain(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
