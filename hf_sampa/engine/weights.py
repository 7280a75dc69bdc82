"""How the trained weights are held, and made to be others for a pass: whole in this process, or, by FSDP2, a shard of each.

The algorithm computes with what is here, `Weights.here`, and does not ask which of the two it is. Norms and sums over what is
spread are added up over the shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..distributed import Exchange, Shards, here, is_spread, part_of, shards_of, spread_as, units, whole
from ..functional import displacement_dot_, norms
from .buckets import Buckets, in_memory_order


def nothing_like(param: Tensor) -> Tensor:
    """NaN in the shape of `param`, without memory for it."""
    return param.new_full((), float("nan")).expand(param.shape)


# Numbers that change places at once: a temporary copy of so many.
PIECE = 2**20


class Weights:
    """Whole in this process. Displaced by pointing the parameters to other memory: x_t itself is not written to.

    Args:
        params: the trained parameters.
        exchange: connects the processes.
    """

    count = 1  # of shards
    gathers = True  # whether a checkpoint is to have whole tensors
    reduces_each = (
        False  # whether the gradient of every micro-batch is brought to where its shards are, which takes less memory
    )

    def __init__(self, params: Sequence[nn.Parameter], exchange: Exchange):
        self.params, self.exchange = params, exchange

    @property
    def sharded(self) -> bool:
        """Whether they are held in shards, be it in one."""
        return isinstance(self, ShardedWeights)

    def here(self) -> list[Tensor]:
        """What of each parameter is in this process."""
        return self.params

    def sizes(self) -> list[int]:
        """Of what is here in bytes; of shards that of the largest, which all processes know."""
        return [param.nbytes for param in self.params]

    # ---- Displaced ----

    def settle(self) -> None:
        """Before a step looks at the model: let it hold its parameters as the optimizer knows them."""

    def move(self, weights: Buckets) -> list[Tensor]:
        """Put displaced weights into the model; returns x_t, of which no copy is made."""
        x = [param.data for param in self.params]
        for param, moved in zip(self.params, weights.views, strict=True):
            param.data = moved
        return x

    def move_back(self, weights: Buckets, x: list[Tensor]) -> None:
        """Put x_t, as `move` gave it for `weights`, into the model again."""
        for param, own in zip(self.params, x, strict=True):
            param.data = own

    def displacement_dot(self, bucket: int, weights: Buckets, x: list[Tensor], grad: Tensor) -> Tensor:
        """<x~_t - x_t, g~_t> ``()`` over a bucket, whose displaced weights nobody reads any more. They are lost."""
        moved, own = weights.among(weights.views, bucket), weights.among(x, bucket)
        return displacement_dot_(moved, own, grad, weights.flats[bucket])

    def spoil(self, bucket: int, weights: Buckets) -> None:
        """Let whoever still reads the displaced weights of a bucket, which nobody should, read NaN."""
        torch._foreach_mul_(weights.among(weights.views, bucket), float("nan"))
        torch.autograd.graph.increment_version(weights.among(self.params, bucket))

    def leave(self, bucket: int, weights: Buckets) -> None:
        """Free the memory of `weights` for something else: nobody reads the displaced weights of this bucket any more."""
        # Should backward read them after all, autograd will say so.
        torch.autograd.graph.increment_version(weights.among(self.params, bucket))

    def let_go(self, bucket: int, weights: Buckets) -> None:
        """As `leave`, and give the memory back. Whoever still reads these weights from the model reads NaN."""
        self.leave(bucket, weights)
        if not weights.has_few(bucket):
            return
        for param in weights.among(self.params, bucket):
            param.data = nothing_like(param)
        weights.release(bucket)

    # ---- Gradients ----

    def adding_up(self, goes_on: bool) -> AbstractContextManager:
        """Around a backward pass after which, or before which, others add to the gradient."""
        return nullcontext()

    def set_grads(self, grads: dict[int, Tensor]) -> None:
        """Make each of `grads`, by the index of its parameter, its gradient, as far as it is here."""
        for i, grad in grads.items():
            self.params[i].grad = grad

    # ---- Whole, for a checkpoint ----

    def whole(self, own: Sequence[Tensor]) -> list[Tensor]:
        """All of tensors like the parameters, of which what is here is given; spread as they are, unless it `gathers`.

        A collective of those that hold parts.
        """
        return list(own)

    def parts(self, of_all: Sequence[Tensor]) -> list[Tensor]:
        """The reverse of `whole`."""
        return list(of_all)

    # ---- Over all shards ----

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norms ``(n,)`` of each of `tensors`, of which the parts that are here are given."""
        return norms(tensors)

    def of_norms(self, own: Tensor) -> Tensor:
        """Norms ``(n,)``, given those of the parts that are here."""
        return own

    def of_sums(self, own: Tensor) -> Tensor:
        """Sums ``(n, ...)``, given those over the parts that are here."""
        return own


class ShardedWeights(Weights):
    """A shard of each. FSDP2 gathers what a pass reads from memory of its own, into which displaced weights are copied.

    Meanwhile x_t is where the displaced weights were. Once backward has read a bucket for the last time, x_t is put back, and
    its place is free for the other role's gradient: a process holds 5 d / S numbers, as of whole weights 5 d.

    Args:
        params: the trained parameters.
        exchange: connects the processes.
        modules: in which they are.
        shards: how they are spread.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], exchange: Exchange, modules: Sequence[nn.Module], shards: Shards
    ):
        super().__init__(params, exchange)
        self.shards, self.count = shards, shards.count
        self._units = units(*modules)
        self._displaced: set[int] = set()  # buckets

    def here(self) -> list[Tensor]:
        return [here(param) for param in self.params]

    def sizes(self) -> list[int]:
        rows = (-(-param.shape[0] // self.count) for param in self.params)
        row_bytes = (math.prod(param.shape[1:]) * param.element_size() for param in self.params)
        return [n * size for n, size in zip(rows, row_bytes, strict=True)]

    def settle(self) -> None:
        # A unit may stay whole after a forward pass, and then reads its shards no more.
        for unit in self._units:
            unit.reshard()

    @torch.no_grad()
    def move(self, weights: Buckets) -> list[Tensor]:
        self.settle()
        for own, moved in zip(self.here(), weights.views, strict=True):
            _change_places(own, moved)
        self._displaced = set(range(len(weights.members)))
        return weights.views

    @torch.no_grad()
    def move_back(self, weights: Buckets, x: list[Tensor]) -> None:
        self.settle()
        for bucket in self._displaced:  # as `weights` was: nobody has taken its memory, and it may be read once more
            for own, moved in zip(
                weights.among(self.here(), bucket), weights.among(weights.views, bucket), strict=True
            ):
                _change_places(own, moved)
        self._displaced = set()

    def displacement_dot(self, bucket: int, weights: Buckets, x: list[Tensor], grad: Tensor) -> Tensor:
        moved, own = weights.among(self.here(), bucket), weights.among(x, bucket)
        if len(moved) == 1:
            return displacement_dot_(moved, own, grad, in_memory_order(moved[0]))
        packed = torch.zeros_like(grad)
        parts = weights.cut(bucket, packed)
        torch._foreach_copy_(parts, moved)
        return displacement_dot_(parts, own, grad, packed)

    @torch.no_grad()
    def spoil(self, bucket: int, weights: Buckets) -> None:
        for own in weights.among(self.here(), bucket):
            own.fill_(float("nan"))

    @torch.no_grad()
    def leave(self, bucket: int, weights: Buckets) -> None:
        if bucket in self._displaced:
            torch._foreach_copy_(weights.among(self.here(), bucket), weights.among(weights.views, bucket))
            self._displaced.discard(bucket)

    def let_go(self, bucket: int, weights: Buckets) -> None:
        self.leave(bucket, weights)
        weights.release(bucket)

    @contextmanager
    def adding_up(self, goes_on: bool) -> Iterator[None]:
        # As under plain Trainer: gradients are added up whole, and reduced once.
        if not goes_on or self.reduces_each:
            yield
            return
        for unit in self._units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in self._units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def set_grads(self, grads: dict[int, Tensor]) -> None:
        super().set_grads({i: spread_as(self.params[i], grad) for i, grad in grads.items()})

    def whole(self, own: Sequence[Tensor]) -> list[Tensor]:
        spread = (spread_as(param, each) for param, each in zip(self.params, own, strict=True))
        # One by one, so that no device need hold all of them.
        return [whole(each).cpu() for each in spread] if self.gathers else list(spread)

    def parts(self, of_all: Sequence[Tensor]) -> list[Tensor]:
        return [part_of(each, param) for param, each in zip(self.params, of_all, strict=True)]

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.of_norms(norms(tensors))

    def of_norms(self, own: Tensor) -> Tensor:
        if self.shards.group is None:
            return own
        return torch.linalg.vector_norm(self.exchange.gather_among(self.shards.group, own), dim=0)

    def of_sums(self, own: Tensor) -> Tensor:
        return own if self.shards.group is None else self.exchange.gather_among(self.shards.group, own).sum(dim=0)


def _change_places(one: Tensor, other: Tensor) -> None:
    """Exchange the contents of two dense tensors of one layout, a piece at a time."""
    one, other = in_memory_order(one), in_memory_order(other)
    for a, b in zip(one.split(PIECE), other.split(PIECE), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def weights_of(
    params: Sequence[nn.Parameter], names: Sequence[str], modules: Sequence[nn.Module], exchange: Exchange
) -> Weights:
    """How `params` are held. Raises ValueError for shards that are none of FSDP2 within a role, or of some parameters only."""
    shards = shards_of(params, exchange.mesh)
    if shards is None:
        return Weights(params, exchange)
    if whole := [name for name, param in zip(names, params, strict=True) if not is_spread(param)]:
        raise ValueError(
            f"Expected trained parameters that are all sharded, or none of them, but {whole[0]!r} and {len(whole) - 1} other(s) of "
            f"{len(params)} are whole. Let fully_shard have them, too, or freeze those that are sharded."
        )
    return ShardedWeights(params, exchange, modules, shards)
