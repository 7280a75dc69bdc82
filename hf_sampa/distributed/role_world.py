"""Inside a pass, a process's world is its role: what others read of the world is lent for that long, and taken back.

Losses and models speak to other processes: they gather negatives, average over devices, count processes, synchronize
BatchNorm. During a pass those others are the k replicas of the process's role, which run the same code on other shares of
one batch. The other role is at other weights with another batch, or waits. With k = 1 the process is alone, as without a
launcher: ``torch.distributed.is_initialized()`` is False.

Libraries read the world in three places: the default group of `torch.distributed`, the state that `accelerate` shares
(`transformers`' training arguments read that, too), and environment variables of launchers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# Imported before any group exists: its functions take the default group of that moment for good, and None is whichever
# is the default when they are called.
import torch.distributed.nn.functional as differentiable
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn
from torch.distributed import distributed_c10d

from .roles import Mesh


# By which launchers tell a process how many there are, and which of them it is. Not LOCAL_RANK, which names the device.
SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

SHARED = ("distributed_type", "num_processes", "process_index", "local_process_index")

_lent: list[_View] = []  # what the whole world looks like, while a role's is lent


@dataclass
class _View:
    """What there is to be read of a world: the default group, what accelerate's two states share, and variables."""

    group: dist.ProcessGroup | None
    shared: list[dict[str, Any]]
    variables: dict[str, str]

    @classmethod
    def current(cls) -> _View:
        shared = [{name: state[name] for name in SHARED if name in state} for state in _shared_states()]
        variables = {name: os.environ[name] for name in (*SIZE_VARIABLES, *RANK_VARIABLES) if name in os.environ}
        return cls(distributed_c10d._world.default_pg, shared, variables)

    def seen_by(self, group: dist.ProcessGroup | None, size: int, rank: int, place_on_node: int) -> _View:
        """The same for `size` of its processes, of which this is number `rank`."""
        told = {"num_processes": size, "process_index": rank, "local_process_index": place_on_node}
        if group is None:
            told["distributed_type"] = DistributedType.NO
        shared = [{name: told.get(name, value) for name, value in state.items()} for state in self.shared]
        numbers = {**dict.fromkeys(SIZE_VARIABLES, size), **dict.fromkeys(RANK_VARIABLES, rank)}
        return _View(group, shared, {name: str(numbers[name]) for name in self.variables})

    def show(self) -> None:
        distributed_c10d._update_default_pg(self.group)
        for state, values in zip(_shared_states(), self.shared, strict=True):
            state.update(values)
        os.environ.update(self.variables)


def _tell_accelerator() -> None:
    """An accelerator that came to be in a role's world took that for the whole."""
    known = AcceleratorState._shared_state
    known.update({name: PartialState._shared_state[name] for name in SHARED[1:] if name in known})


def _shared_states() -> tuple[dict[str, Any], dict[str, Any]]:
    return PartialState._shared_state, AcceleratorState._shared_state


class RoleWorld:
    """The world of one role, to be lent to code that is not this package's.

    Args:
        mesh: who takes part.
        group: of the replicas of this process's role.
    """

    def __init__(self, mesh: Mesh, group: dist.ProcessGroup | None = None):
        self.mesh, self.group = mesh, group
        if mesh.paired:
            _follow_default_group()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the world is the role's, if roles are spread over processes; afterwards, whatever happened, it is whole."""
        if not self.mesh.paired or _lent:
            yield
            return
        alone = self.mesh.num_replicas == 1
        with _lend(self._of_role(_View.current(), None if alone else self.group), alone):
            yield

    @contextmanager
    def lent_to_shard(self) -> Iterator[None]:
        """As `lent`, with a group even where the process is alone in its role: what shards a model makes a mesh of it."""
        if not self.mesh.paired or _lent:
            yield
            return
        with _lend(self._of_role(_View.current(), self.group), alone=False):
            yield
        _tell_accelerator()

    def _of_role(self, whole: _View, group: dist.ProcessGroup | None) -> _View:
        return whole.seen_by(group, self.mesh.num_replicas, self.mesh.replica, self._place_on_node())

    def _place_on_node(self) -> int:
        """Among the replicas of this role that run on this machine."""
        on_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.mesh.world_size))
        first = self.mesh.rank - self.mesh.rank % on_node
        return sum(first <= rank < self.mesh.rank for rank in self.mesh.ranks_of(self.mesh.roles[0]))


ALONE = (
    "A loss, model or loader asked for the default process group, and there is none: inside a pass a process's world is the "
    "replicas of its role, and this process is the only one of its role, as if it had been started without a launcher. Ask "
    "torch.distributed.is_initialized() first, as code does that is to run on one process, too."
)


class Alone(ValueError):
    """Code asked for the processes of a world in which there is but one."""


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process is the only one, for code that several do not run alike. Not within another lent world.

    Raises Alone where that code needs a process group.
    """
    _follow_default_group()
    with _lend(_View.current().seen_by(None, 1, 0, 0), alone=True):
        yield


@contextmanager
def _lend(view: _View, alone: bool) -> Iterator[None]:
    """Show `view` within the block; what asks for a default group that is not there, is told why."""
    whole = _View.current()
    _lent.append(whole)
    view.show()
    try:
        yield
    except ValueError as error:
        if alone and "Default process group has not been initialized" in str(error):
            raise Alone(ALONE) from error
        raise
    finally:
        _lent.clear()
        whole.show()


@contextmanager
def whole_world() -> Iterator[None]:
    """Within the block the world is whole again, though a role's be lent: for this package's own exchange during a pass."""
    if not _lent:
        yield
        return
    role, whole = _View.current(), _lent.pop()
    whole.show()
    try:
        yield
    finally:
        _lent.append(whole)
        role.show()


def whole_size_and_rank(size: int, rank: int) -> tuple[int, int]:
    """Of the whole world, where `size` and `rank` are those that are to be read now."""
    if not _lent:
        return size, rank
    whole = _lent[0].shared[0]
    return whole["num_processes"], whole["process_index"]


def groups_of_modules(modules: dict[str, nn.Module]) -> dict[str, dist.ProcessGroup]:
    """Process groups that modules hold, by name: those, unlike the default group, cannot be lent."""
    return {
        f"{prefix}{'.' if prefix and path else ''}{path}.{name}": value
        for prefix, root in modules.items()
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, dist.ProcessGroup)
    }


def _follow_default_group() -> None:
    """Let `torch.distributed.nn.functional` look for the default group when it is called, if it was imported late."""
    known = distributed_c10d._world.default_pg
    for function in vars(differentiable).values():
        defaults = getattr(function, "__defaults__", None)
        if known is not None and defaults and any(value is known for value in defaults):
            function.__defaults__ = tuple(None if value is known else value for value in defaults)
