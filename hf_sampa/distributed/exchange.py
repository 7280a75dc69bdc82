"""Every collective of the package: means within a role, swaps across roles, and the few numbers of a step.

What travels per step and process, with d trainable weights, while backward is still running: d numbers to the other half of the
pair and d back. With k replicas each bucket is added up at one of them, which swaps it with the other role, and both gradients go
to the replicas from there: on average (k - 1)/k d, d/k and 2 (k - 1)/k d.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.profiler import record_function

from ..compat import let_threads_go
from ..functional import real
from .role_world import RoleWorld, whole_world
from .roles import Mesh, Role


# Large enough that a bucket's latency does not matter, small enough that the first one leaves early in backward.
BUCKET_BYTES = 4 * 2**20

# Buckets under way on one leg while there is another to come: enough to keep the wire busy.
MOST_UNDER_WAY = 4

# What a leg has begun, to be waited for.
Works = Sequence["dist.Work | _Fetched"]

_open: list[Exchange] = []  # those that hold process groups
_lent: dict[Mesh, dist.ProcessGroup] = {}  # of a process's role, by its mesh; a model that FSDP2 has sharded keeps it


def close_groups() -> None:
    """Close this package's process groups, then the default group; for the end of a script. Waits for no other process.

    A thread of an open group may let go of the last tensor that it was given when the interpreter has begun to end; Python
    then ends that thread in the middle of C++ code, which aborts the process, though all its work is done.
    """
    if any(each.waits_for_role for each in _open):
        return  # closing would wait for these, with a process that may be gone
    for exchange in list(_open):
        exchange.close()
    _lent.clear()
    if dist.is_available() and dist.is_initialized():
        let_threads_go()
        dist.destroy_process_group()


@atexit.register
def _close_forgotten_groups() -> None:
    if not _open:
        return
    if not hasattr(sys, "last_value"):
        close_groups()
    # An exception is on its way: what is under way may wait for a process that is gone.
    elif dist.is_initialized() and dist.get_backend() == "gloo" and not any(each.busy for each in _open):
        close_groups()


def partition(
    params: Sequence[Tensor], bucket_bytes: int, kinds: Sequence[Any] | None = None, sizes: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of `params` from last to first, cut where `bucket_bytes` are full, or dtype, device or kind change.

    sizes: in bytes, where those of `params` are not what counts.
    """
    groups: list[list[int]] = []
    filled, before = 0, None
    for i in reversed(range(len(params))):
        kind, size = (params[i].dtype, params[i].device, kinds and kinds[i]), sizes[i] if sizes else params[i].nbytes
        if not groups or kind != before or filled + size > bucket_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled, before = filled + size, kind
    return groups


class PeerLost(RuntimeError):
    """Another process did not answer in time, or has ended."""


@contextmanager
def peers_expected() -> Iterator[None]:
    """Around code that may wait for other processes, in whatever library. Raises PeerLost where one does not answer."""
    try:
        yield
    except PeerLost:
        raise
    except RuntimeError as error:
        if not _is_of_peers(error):
            raise
        raise _lost(error) from error


def _is_of_peers(error: RuntimeError) -> bool:
    """Whether `error` is torch's, of a process that does not answer; gloo's are plain, and name the file of gloo that raises."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _lost(error: Exception) -> PeerLost:
    with whole_world():
        if dist.is_initialized():
            rank, others = dist.get_rank(), dist.get_world_size() - 1
        else:  # it was waited for in vain when the world was to begin
            rank, others = os.environ.get("RANK", "?"), int(os.environ.get("WORLD_SIZE", 2)) - 1
    return PeerLost(
        f"Rank {rank} expected an answer from the other {others} process(es) of this run and got none. Most likely one "
        "of them has died; the cause is in its own log. If none has: a process takes part in something that the others do not "
        "reach, as code of your own that speaks to the other processes outside of a pass (a callback, a metric) does on some of "
        "them only, or an evaluation, a save or a stop that only one of them begins. Processes that are merely slow need a larger "
        f"--ddp_timeout. Start the run again with resume_from_checkpoint=True. What torch says: {error}"
    )


def _group_of_role(mesh: Mesh, timeout: timedelta) -> dist.ProcessGroup:
    """A new one of this process's role. Every process has to take part in the creation of every group."""
    return {role: dist.new_group(mesh.ranks_of(role), timeout=timeout) for role in Role}[mesh.roles[0]]


def role_world(mesh: Mesh, timeout: timedelta) -> RoleWorld:
    """What this process's role is to see of the world. A collective, the first time.

    Its group is none that anything else travels through, so that what a loss gathers and what is exchanged meanwhile do not meet.
    """
    if mesh.paired and _lent.get(mesh) not in distributed_c10d._world.pg_map:
        with peers_expected():
            _lent[mesh] = _group_of_role(mesh, timeout)
    return RoleWorld(mesh, _lent.get(mesh))


class _Fetched:
    """The last of what a transfer waits for: to bring what gloo received to the device that it is for."""

    def __init__(self, received: Tensor, into: Tensor):
        self.received, self.into = received, into

    def wait(self) -> None:
        self.into.copy_(self.received)


class Exchange:
    """Moves tensors between the processes of a mesh; does nothing in a world of one.

    Args:
        mesh: who takes part.
        timeout: how long to wait for another process.

    Attributes:
        role_world: what user code is to see of the world during a pass.
    """

    def __init__(self, mesh: Mesh, timeout: timedelta = timedelta(minutes=30)):
        self.mesh = mesh
        self.bytes_sent = 0
        self._world_group = self._role_group = None
        # By leg: what is under way on it, and the legs to come.
        self._under_way: list[deque[tuple[Works, Sequence[Callable[[], Works | None]]]]] = []
        with peers_expected():
            if mesh.world_size > 1:
                # Others speak to one another through the default group, and may have made it without the timeout.
                distributed_c10d._set_pg_timeout(timeout)
                self._world_group = self._role_group = dist.new_group(timeout=timeout)
            if mesh.paired and mesh.num_replicas > 1:
                self._role_group = _group_of_role(mesh, timeout)
        self.role_world = role_world(mesh, timeout)
        self._groups = list({id(each): each for each in (self._world_group, self._role_group) if each}.values())
        if self._groups:
            _open.append(self)

    @property
    def busy(self) -> bool:
        """Whether anything was started that is not finished."""
        return any(self._under_way)

    @property
    def waits_for_role(self) -> bool:
        """Whether anything under way may be a collective of several replicas."""
        return self.busy and self.mesh.num_replicas > 1

    def close(self) -> None:
        """Give its process groups back; it cannot be used afterwards."""
        if self._groups:
            let_threads_go()
        while self._groups:
            group = self._groups.pop()
            if group in distributed_c10d._world.pg_map:  # nobody else has closed it
                dist.destroy_process_group(group)
        self._world_group = self._role_group = None
        _open.remove(self)

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Give all ranks the tensors of rank `source`, in place; small ones travel together."""
        if self.mesh.world_size == 1:
            return
        for members in partition(tensors, BUCKET_BYTES):
            several = [tensors[i].detach() for i in members]
            flat = torch.cat([tensor.reshape(-1) for tensor in several])
            (numbers,) = real([flat])  # gloo knows complex ones from some version of torch on
            with self._peers_alive():
                dist.broadcast(numbers, src=source, group=self._world_group)
            for tensor, part in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def broadcast_shards(self, tensors: Sequence[Tensor], count: int) -> None:
        """Give all ranks the tensors of the first rank that holds the same one of `count` shards, in place."""
        rank, (first, *others) = self.mesh.rank, self.mesh.alike(count)
        others = others if rank == first else [first]
        for tensor in tensors:
            near = self._near(tensor)
            with self._peers_alive():
                for other in others:
                    move = dist.send if rank == first else dist.recv
                    move(near, other, group=self._world_group)
            if near is not tensor:
                tensor.copy_(near)

    def sum_within_role(self, value: float) -> float | Tensor:
        """Sum of one number over the replicas of this process's role; of several a tensor ``()``, not waited for."""
        if self.mesh.num_replicas == 1:
            return value
        total = torch.full((), value, dtype=torch.float64, device=self._device())
        with self._peers_alive():
            dist.all_reduce(total, group=self._role_group)
        return total

    # ---- Buckets, on their way while backward goes on ----

    def start(self, *legs: Callable[[], Works | None]) -> None:
        """Begin to move a bucket; `finish` waits for it. All ranks of a role start as many in the same order.

        Args:
            legs: called one after the other; each begins something, or nothing, once what the one before it began is through. That is
                waited for when `MOST_UNDER_WAY` buckets have come to the same leg since.
        """
        self._go_on(0, legs)

    def _go_on(self, leg: int, legs: Sequence[Callable[[], Works | None]]) -> None:
        works = legs[0]() or ()
        if leg == len(self._under_way):
            self._under_way.append(deque())
        self._under_way[leg].append((works, legs[1:]))
        if len(legs) > 1 and len(self._under_way[leg]) > MOST_UNDER_WAY:
            self._arrive(leg)

    def _arrive(self, leg: int) -> None:
        works, legs = self._under_way[leg].popleft()
        self._wait(works)
        if legs:
            self._go_on(leg + 1, legs)

    def finish(self) -> None:
        """Wait until everything that was started is through."""
        with record_function("SAMPa.exchange"):
            leg = 0
            while leg < len(self._under_way):
                while self._under_way[leg]:
                    self._arrive(leg)
                leg += 1

    def _wait(self, works: Works) -> None:
        with self._peers_alive():
            for work in works:
                work.wait()

    def transfer(self, mine: Tensor | None, theirs: Tensor | None) -> Works:
        """Begin to send `mine` to, and to receive `theirs` from, the other half of the pair; nothing without pairs.

        The other half must ask for the reverse at the same place in its own order.

        Args:
            mine: ``(n,)``, or None to send nothing.
            theirs: ``(m,)``, or None to receive nothing.
        """
        mine, theirs = (None if each is None or not each.numel() else each for each in (mine, theirs))
        if not self.mesh.paired or (mine is None and theirs is None):
            return ()
        peer, group = self.mesh.peer, self._world_group
        given, place = self._near(mine), self._near(theirs, empty=True)
        ops = [] if mine is None else [dist.P2POp(dist.isend, given, peer, group)]
        ops += [] if theirs is None else [dist.P2POp(dist.irecv, place, peer, group)]
        self.bytes_sent += 0 if mine is None else mine.nbytes
        with self._peers_alive():
            works = dist.batch_isend_irecv(ops)
        return works if place is theirs else [*works, _Fetched(place, theirs)]

    def add_up(self, mine: Tensor, replica: int) -> Works:
        """Begin to add up `mine` ``(n,)`` over the replicas of this role, at one of them; what the others hold is lost."""
        self.bytes_sent += mine.nbytes * (self.mesh.replica != replica)
        with self._peers_alive():
            return [dist.reduce(mine, self._rank_in_role(replica), group=self._role_group, async_op=True)]

    def hand_out(self, tensor: Tensor, replica: int) -> Works:
        """Begin to give `tensor` ``(n,)`` of one replica to all of this role; counted as if each passed it on to the next."""
        is_last = (self.mesh.replica - replica) % self.mesh.num_replicas == self.mesh.num_replicas - 1
        self.bytes_sent += tensor.nbytes * (not is_last)
        with self._peers_alive():
            return [dist.broadcast(tensor, self._rank_in_role(replica), group=self._role_group, async_op=True)]

    def hand_out_to_all(self, tensor: Tensor, rank: int) -> Works:
        """As `hand_out`, to all processes."""
        is_last = (self.mesh.rank - rank) % self.mesh.world_size == self.mesh.world_size - 1
        self.bytes_sent += tensor.nbytes * (not is_last)
        with self._peers_alive():
            return [dist.broadcast(tensor, rank, group=self._world_group, async_op=True)]

    def sum_over_replicas(self, mine: Tensor) -> Works:
        """Begin to add up `mine` ``(n,)`` over the replicas of this role, at all of them."""
        self.bytes_sent += 2 * (self.mesh.num_replicas - 1) * mine.nbytes // self.mesh.num_replicas
        with self._peers_alive():
            return [dist.all_reduce(mine, group=self._role_group, async_op=True)]

    def _rank_in_role(self, replica: int) -> int:
        return self.mesh.ranks_of(self.mesh.roles[0])[replica]

    def _near(self, tensor: Tensor | None, empty: bool = False) -> Tensor | None:
        """`tensor`, or where gloo is to move it from one process to another, which reads the memory of the host only, a copy there."""
        if tensor is None or tensor.device.type == "cpu" or dist.get_backend(self._world_group) != "gloo":
            return tensor
        return torch.empty_like(tensor, device="cpu") if empty else tensor.cpu()

    def gather(self, row: Tensor) -> Tensor:
        """Rows of all ranks, ``(world_size, n)``, from this rank's ``(n,)``; for the few numbers of a step."""
        if self.mesh.world_size == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.mesh.world_size)]
        with self._peers_alive():
            dist.all_gather(rows, row, group=self._world_group)
        return torch.stack(rows)

    def gather_in_role(self, own: Tensor) -> Tensor:
        """As `gather_among`, of the replicas of this role."""
        return self.gather_among(self._role_group, own)

    def gather_among(self, group: dist.ProcessGroup, own: Tensor) -> Tensor:
        """What each process of `group` gave, ``(processes, ...)``, of one shape on all; for the few numbers of a step."""
        found = [torch.empty_like(own) for _ in range(group.size())]
        with self._peers_alive():
            dist.all_gather(found, own.contiguous(), group=group)
        return torch.stack(found)

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.gather(torch.zeros(1, device=self._device() if self.mesh.world_size > 1 else None)).cpu()

    def concatenate(self, own: Tensor) -> Tensor:
        """All ranks' ``(n_i, ...)`` one after the other; the n_i may differ. For what is small."""
        if self.mesh.world_size == 1:
            return own
        own = own.to(self._device())
        sizes = self.gather(torch.tensor([len(own)], device=own.device))[:, 0].tolist()
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        rows = self.gather(padded.flatten()).view(len(sizes), *padded.shape)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def share_objects(self, item: Any) -> list[Any]:
        """What every rank gave, by rank, on all of them; for what is small and rare: items are pickled."""
        if self.mesh.world_size == 1:
            return [item]
        found = [None] * self.mesh.world_size
        with self._peers_alive():
            dist.all_gather_object(found, item, group=self._world_group)
        return found

    def collect(self, item: Any) -> list[Any] | None:
        """What every rank gave, by rank, on rank 0; None on the others. For checkpoints: items are pickled."""
        if self.mesh.world_size == 1:
            return [item]
        found = [None] * self.mesh.world_size if self.mesh.rank == 0 else None
        with self._peers_alive():
            dist.gather_object(item, found, dst=0, group=self._world_group)
        return found

    @staticmethod
    def _device() -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )

    @contextmanager
    def _peers_alive(self) -> Iterator[None]:
        try:
            with whole_world():  # gradients travel while a pass, to which a role's world is lent, is still running
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # gloo reports closed connections and timeouts as plain RuntimeErrors, nccl as a subclass.
            raise _lost(error) from error
