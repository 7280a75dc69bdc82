"""What a run starts with on one process, to be compared with the others before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.trainer_utils import has_length

from .cards import versions
from .state import fingerprint, fingerprint_of_print, other_modules


if TYPE_CHECKING:
    from .trainer import SAMPaMixin

# Settings that may differ between processes: where each one writes, what it shows, and how it reaches others.
OWN = {
    *(
        "output_dir",
        "run_name",
        "report_to",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "resume_from_checkpoint",
    ),
    *(
        "local_rank",
        "ddp_timeout",
        "debug",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    *(
        "hub_token",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_always_push",
        "hub_strategy",
    ),
}
# The latter are set by whoever saves the model, which is one process.
OWN_OF_CONFIG = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def started_with(trainer: SAMPaMixin, max_steps: int) -> dict[str, Any]:
    """Plain values by name: settings, data, model, optimizer and versions of packages, equal on all processes of a run."""
    return {
        **_settings(trainer.args),
        "steps of this run": [trainer.state.global_step, max_steps],
        **_sizes(trainer),
        **_model(trainer.model),
        **{
            f"{name} {key}": value
            for name, module in other_modules(trainer, trainer.model).items()
            for key, value in _tensors(module).items()
        },
        **_optimizer(trainer.optimizer.optimizer),
        "class of the schedule": type(trainer.lr_scheduler).__name__,
        **{f"version of {name}": version for name, version in versions().items()},
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
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _sizes(trainer: SAMPaMixin) -> dict[str, Any]:
    data = {
        "train_dataset": trainer.train_dataset,
        "eval_dataset": trainer.eval_dataset,
        "train batches": trainer._run.loader,
    }
    return {
        f"length of {name}": len(each) for name, each in data.items() if isinstance(each, Sized) and has_length(each)
    }


def _model(model: nn.Module) -> dict[str, Any]:
    config = model.config.to_dict() if isinstance(getattr(model, "config", None), PreTrainedConfig) else {}
    return {
        "class of the model": type(model).__name__,
        **{f"model.config.{name}": _plain(value) for name, value in config.items() if name not in OWN_OF_CONFIG},
        **_tensors(model),
        # Dropout and other layers without weights.
        "fingerprint of print(model)": fingerprint_of_print(model),
    }


def _tensors(module: nn.Module) -> dict[str, str]:
    found = {}
    for name, param in module.named_parameters():
        found[f"parameter {name}"] = f"{list(param.shape)} {param.dtype}{'' if param.requires_grad else ' frozen'}"
    for name, buffer in module.named_buffers():
        found[f"buffer {name}"] = f"{list(buffer.shape)} {buffer.dtype}"
    return found


def _optimizer(optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"class of the optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}"}
    for i, group in enumerate(optimizer.param_groups):
        shapes = [list(param.shape) for param in group["params"]]
        found[f"number of parameters in optimizer group {i}"] = len(shapes)
        found[f"fingerprint of their shapes in optimizer group {i}"] = fingerprint(shapes)
        found |= {f"{name} of optimizer group {i}": _plain(value) for name, value in group.items() if name != "params"}
    return found
