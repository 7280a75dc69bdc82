"""Every collective of the package: means within a role, swaps across roles, and the few numbers of a step.

What travels per step and process, with d trainable weights: d numbers to the other half of the pair and d back, while
backward is still running; with several replicas, an all-reduce of d numbers within the role before that.
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

# Transfers under way when memory is to be given back after them: enough to keep the wire busy.
MOST_UNSENT = 4

_open: list[Exchange] = []  # those that hold process groups
_lent: dict[Mesh, dist.ProcessGroup] = {}  # of a process's role, by its mesh; a model that FSDP2 has sharded keeps it


def close_groups() -> None:
    """Close this package's process groups, then the default group; for the end of a script. Waits for no other process.

    A thread of an open group may let go of the last tensor that it was given when the interpreter has begun to end; Python
    then ends that thread in the middle of C++ code, which aborts the process, though all its work is done.
    """
    if any(each._means for each in _open):
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
        self._means: list[tuple[dist.Work, Tensor, Callable[[], None]]] = []
        self._transfers: deque[tuple[list[dist.Work], Callable[[], None] | None]] = deque()
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
        return bool(self._means or self._transfers)

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
        rank, size = self.mesh.rank, self.mesh.world_size
        first = rank % count
        others = range(first + count, size, count) if rank == first else [first]
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

    def start(
        self,
        mine: Tensor,
        theirs: Tensor | None = None,
        *,
        send: bool = True,
        mean: bool = False,
        ready: Callable[[], None] = lambda: None,
        sent: Callable[[], None] | None = None,
    ) -> None:
        """Begin to exchange one bucket; `finish` waits for it. All ranks start their buckets in the same order.

        Args:
            mine: ``(n,)``, this role's gradient of the bucket; holds the role's mean afterwards.
            theirs: ``(n,)``, receives the other role's mean; None where it is not wanted. Left alone without pairs.
            send: whether the other role wants `mine`.
            mean: whether it holds the role's mean already.
            ready: called once `mine` holds the mean, before it travels.
            sent: see `transfer`.
        """

        def go_on() -> None:
            ready()
            self.transfer(mine if send else None, theirs, sent=sent)

        if mean or self.mesh.num_replicas == 1:
            go_on()
            return
        with self._peers_alive():
            self._means.append((dist.all_reduce(mine, group=self._role_group, async_op=True), mine, go_on))
        self.bytes_sent += mine.nbytes

    def transfer(self, mine: Tensor | None, theirs: Tensor | None, *, sent: Callable[[], None] | None = None) -> None:
        """Begin to send `mine` to, and to receive `theirs` from, the other half of the pair; `finish` waits for both.

        The other half must ask for the reverse at the same place in its own order. Does nothing without pairs.

        Args:
            mine: ``(n,)``, or None to send nothing.
            theirs: ``(m,)``, or None to receive nothing.
            sent: called when both are through. Waits for the oldest transfer where more than `MOST_UNSENT` are under way.
        """
        if not self.mesh.paired:
            return
        peer, group = self.mesh.peer, self._world_group
        mine, theirs = (None if each is None or not each.numel() else each for each in (mine, theirs))
        given, place = self._near(mine), self._near(theirs, empty=True)
        ops = [] if mine is None else [dist.P2POp(dist.isend, given, peer, group)]
        ops += [] if theirs is None else [dist.P2POp(dist.irecv, place, peer, group)]
        if not ops:
            return

        def through() -> None:
            if place is not theirs:
                theirs.copy_(place)
            if sent:
                sent()

        with self._peers_alive():
            self._transfers.append((dist.batch_isend_irecv(ops), through))
        if sent and len(self._transfers) > MOST_UNSENT:
            self._wait(*self._transfers.popleft())
        self.bytes_sent += 0 if mine is None else mine.nbytes

    def _near(self, tensor: Tensor | None, empty: bool = False) -> Tensor | None:
        """`tensor`, or where gloo is to move it from one process to another, which reads the memory of the host only, a copy there."""
        if tensor is None or tensor.device.type == "cpu" or dist.get_backend(self._world_group) != "gloo":
            return tensor
        return torch.empty_like(tensor, device="cpu") if empty else tensor.cpu()

    def finish(self) -> None:
        """Wait until everything that was started has its mean and has been transferred."""
        with record_function("SAMPa.exchange"):
            for work, mine, go_on in self._means:
                self._wait([work])
                mine.div_(self.mesh.num_replicas)
                go_on()
            while self._transfers:
                self._wait(*self._transfers.popleft())
        self._means.clear()

    def _wait(self, works: list[dist.Work], sent: Callable[[], None] | None = None) -> None:
        with self._peers_alive():
            for work in works:
                work.wait()
        if sent:
            sent()

    def gather(self, row: Tensor) -> Tensor:
        """Rows of all ranks, ``(world_size, n)``, from this rank's ``(n,)``; for the few numbers of a step."""
        if self.mesh.world_size == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.mesh.world_size)]
        with self._peers_alive():
            dist.all_gather(rows, row, group=self._world_group)
        return torch.stack(rows)

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
