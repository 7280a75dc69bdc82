"""FSDP2 as Trainer's own settings ask for it: each role shards a model of its own, over its own processes.

accelerate shards over all processes of the world that it sees. While it does, that is the world of the role.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer

from .compat import check_shards
from .distributed import Mesh, RoleWorld, role_world
from .state import stood_in


def asked_for(args: Any) -> bool:
    """Whether the training arguments, or accelerate's launcher, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def check_version(args: Any) -> None:
    """Raise ValueError for FSDP1, and ImportError for packages too old for FSDP2. To be asked before accelerate refuses them in words of its own."""
    asked = (args.fsdp_plugin_args or {}).get("fsdp_version") if args.fsdp else os.environ.get("FSDP_VERSION", "1")
    if asked_for(args) and str(asked or 1) != "2":
        raise ValueError(
            "fsdp_config: expected version 2, got version 1, whose flat parameters hide the weights that SAMPa displaces. Set "
            "fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's configuration."
        )
    if asked_for(args):
        check_shards()


def sizes_asked_for(args: Any) -> ParallelismConfig | None:
    """Of the mesh of a role, by the training arguments or by accelerate's launcher."""
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return args.parallelism_config or (ParallelismConfig() if launched else None)


def check_sizes(args: Any) -> None:
    """Raise ValueError where a mesh is asked for that is not as large as a role, or on processes that hold no shards."""
    sizes = sizes_asked_for(args)
    if sizes is None:
        return
    if asked_for(args) and PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise _no_devices(args)  # accelerate would refuse it in words of its own
    if sizes.total_size != args.num_replicas:
        of_launcher = (
            "" if args.parallelism_config else " accelerate reads them by names that begin with parallelism_config_."
        )
        raise ValueError(
            f"parallelism_config: expected sizes for the {args.num_replicas} process(es) of one role, got "
            f"{sizes.total_size}. With method='sampa' each half of the {args.world_size} processes has a mesh of its own.{of_launcher}"
        )


def _no_devices(args: Any) -> ValueError:
    return ValueError(
        f"fsdp: expected processes with a GPU each, got {args.world_size} process(es) on {args.device.type}, over which accelerate shards "
        "no model. Train on GPUs; or leave fsdp out, and start with a configuration that has none, as --config cpu_2_processes."
    )


def name_layers(trainer: Trainer) -> None:
    """Name the layers that are gathered one by one, where nobody has: without those that hold the input embeddings.

    accelerate takes them from the model, and shards the embeddings by themselves besides, where 1.15 fails for BERT and ViT.
    """
    model, plugin = trainer.model, getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None and isinstance(model, PreTrainedModel):
        plugin.transformer_cls_names_to_wrap = layers_to_name(model)


def layers_to_name(model: PreTrainedModel) -> list[str] | None:
    """Classes for `transformer_layer_cls_to_wrap`; None where those that the model names itself will do."""
    kinds = {type(each).__name__: each for each in model.modules()}
    names = sorted(name for name in model._no_split_modules or () if name in kinds)
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # of CLIP, for example, where accelerate stops
        return None
    held = [name for name in names if any(each is embeddings for each in kinds[name].modules())]
    return [name for name in names if name not in held] if held else None


def check_fsdp(trainer: Trainer) -> None:
    """Raise ValueError where FSDP is asked for, and not to be had in this way."""
    if not asked_for(trainer.args):
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise _no_devices(trainer.args)
    kinds = [kind for kind in type(trainer).__mro__ if kind.__module__.startswith("sentence_transformers.")]
    if kinds:
        raise ValueError(
            f"fsdp: expected a trainer that saves the weights that it is given, got {kinds[0].__name__}, which runs and saves the "
            "model on one process, where there is but a part of it. Leave fsdp out; shard_optimizer=True saves memory."
        )
    if getattr(plugin.cpu_offload, "pin_memory", None) is not None:
        raise ValueError(
            "fsdp_config: expected weights that stay on their device, got cpu_offload: the two processes of a pair exchange "
            "gradients there. Leave it out; shard_optimizer=True saves memory."
        )


def shard_within_role(trainer: Trainer, mesh: Mesh, timeout: timedelta) -> None:
    """Let accelerate shard the model of `trainer` over the processes of this one's role."""
    if mesh.paired and asked_for(trainer.args):
        accelerator = trainer.accelerator
        accelerator.prepare = _Within(role_world(mesh, timeout), accelerator.prepare)


@contextmanager
def whole_for_data(accelerator: Accelerator) -> Iterator[None]:
    """Within the block accelerate shares data out among all processes, and not by the mesh of one role's model."""
    state = accelerator.state
    with stood_in(state, "device_mesh", None) if getattr(state, "device_mesh", None) is not None else nullcontext():
        yield


class _Within:
    """`prepare`, for a model with its optimizer in the world of the role."""

    def __init__(self, world: RoleWorld, prepare: Callable[..., Any]):
        self.world, self.prepare = world, prepare

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, nn.Module) for each in args):
            return self.prepare(*args, **kwargs)
        with self.world.lent_to_shard():
            return self.prepare(*args, **kwargs)
