"""Checkpoints of which every process writes, and reads, what it holds: FSDP2's ``state_dict_type="SHARDED_STATE_DICT"``.

What both roles hold alike, weights, moments and g_t, `torch.distributed.checkpoint` takes from either; what lies in one of them, as
halves of a shared optimizer, from that one. So all processes write together, and each about as much. No process ever has more than
one whole tensor. Any run reads them: a process takes what it holds, and one without FSDP holds all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from transformers import Trainer

from ..distributed import here, is_spread, role_world, spread_as, units
from ..state import stood_in
from . import dcp
from .whole import weights_in
from .writing import disk_problem


Spread = dict[str, dict[str, Tensor]]  # by what they are, and by name
G_T, RECIPE = "g", "recipe"  # of tensors that `write` writes: what they are


class Unfit(ValueError):
    """A checkpoint holds other tensors than those that are to be read from it."""


def wanted(trainer: Trainer) -> bool:
    """Whether the checkpoints of `trainer` are to be written in this way."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "SHARDED" in str(plugin.state_dict_type) and bool(units(trainer.model))


# ---- Writing ----


def write(folder: Path, tensors: Spread) -> None:
    """Write `tensors` into the checkpoint in `folder`. A collective of all processes."""
    named = {f"{what}:{name}": each for what, several in tensors.items() for name, each in several.items()}
    torch_checkpoint.save(named, storage_writer=torch_checkpoint.FileSystemWriter(folder / dcp.OWN))


@contextmanager
def as_one_error() -> Iterator[None]:
    """Within the block, what fails on some processes while all write is one error on all; of a disk, OSError."""
    try:
        yield
    except CheckpointException as problem:
        failures = problem.failures
        errors = {rank: error for rank, (error, _) in failures.items()}
        of_disk = all(disk_problem(error) or _from_torch_files(frames) for error, frames in failures.values())
        words = "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in errors.items())
        raise (OSError if of_disk else RuntimeError)(words) from None


def _from_torch_files(frames: Any) -> bool:
    """Whether an error, that another process may have sent, comes from where torch writes a file."""
    return frames is not None and bool(frames) and Path(frames[-1].filename) == Path(torch.serialization.__file__)


@contextmanager
def with_state(optimizer: Optimizer) -> Iterator[None]:
    """Within the block torch takes an optimizer without state for one that has none to be made. It would take a step otherwise."""
    first = optimizer.param_groups[0]["params"][0]
    if optimizer.state or first.grad is not None:
        yield
        return
    first.grad = torch.zeros_like(first)
    try:
        yield
    finally:
        first.grad = None


def no_weights(model: nn.Module) -> dict[str, Tensor]:
    """A state dict for what is saved beside the weights, as a configuration is: peft looks for the names of what it adapts."""
    return {name: torch.empty(0) for name in model.state_dict()} if hasattr(model, "peft_config") else {}


def remove_no_weights(folder: Path) -> None:
    """Remove the files that hold `no_weights`."""
    for file in weights_in(folder):
        file.unlink()


def split(state: dict[str, Any], at: str = RECIPE) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """`state` without its lists of spread tensors, and these, by where they were."""
    rest, lists = {}, {}
    for name, value in state.items():
        if isinstance(value, dict):
            rest[name], inner = split(value, f"{at}.{name}")
            lists |= inner
        elif isinstance(value, list) and value and is_spread(value[0]):
            lists[f"{at}.{name}"] = value
        else:
            rest[name] = value
    return rest, lists


# ---- Reading ----


def holds_parts(folder: str | Path, name: str) -> bool:
    """Whether the checkpoint in `folder` has parts of that `name`, of the weights or of the optimizer."""
    return (Path(folder) / name).is_dir()


@contextmanager
def reading_parts(trainer: Trainer) -> Iterator[None]:
    """Within the block Trainer, sharded or not, loads model and optimizer from parts, in the world of its role. Raises as `checked`."""
    args = trainer.args
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    with (
        checked(),
        stood_in(trainer, "is_fsdp_enabled", True),
        stood_in(trainer.accelerator.state, "fsdp_plugin", plugin),
        role_world(args.mesh, args.ddp_timeout_delta).lent_to_shard(),
    ):
        yield


@contextmanager
def checked() -> Iterator[None]:
    """Around what loads from parts. Raises Unfit where they are of another model or optimizer."""
    try:
        yield
    except CheckpointException as problem:
        error, _ = next(iter(problem.failures.values()))
        raise Unfit(f"{type(error).__name__}: {error}") from None


def read(folder: Path, like: Mapping[str, Tensor]) -> Spread:
    """What `write` wrote into the checkpoint in `folder`; nothing, where it wrote nothing.

    Args:
        folder: the checkpoint.
        like: by name; what has one of these names, and its shape, is spread as it is. All else is whole.
    """
    if not (folder / dcp.OWN).is_dir():
        return {}
    reader = torch_checkpoint.FileSystemReader(folder / dcp.OWN)
    places = {key: _place(key, kept, like) for key, kept in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # every process reads by itself
        torch_checkpoint.load(places, storage_reader=reader, no_dist=True)
    found: Spread = {}
    for key, tensor in places.items():
        what, _, name = key.partition(":")
        found.setdefault(what, {})[name] = tensor
    return found


def _place(key: str, kept: Any, like: Mapping[str, Tensor]) -> Tensor:
    """Memory for what `kept` describes."""
    param = like.get(key.partition(":")[2].partition("@")[0])  # gradients of one weight by shards of a batch
    if param is None or not is_spread(param) or param.shape != kept.size:
        return torch.empty(kept.size, dtype=kept.properties.dtype)
    return spread_as(param, torch.empty_like(here(param), dtype=kept.properties.dtype))


def put_back(state: dict[str, Any], lists: Mapping[str, Mapping[str, Tensor]], names: list[str]) -> dict[str, Any]:
    """The reverse of `split`, of lists by `names`."""
    for place, tensors in lists.items():
        _, *inner, last = place.split(".")
        own = state
        for name in inner:
            own = own.setdefault(name, {})
        own[last] = [tensors[name] for name in names]
    return state
