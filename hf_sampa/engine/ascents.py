"""What the perturbations of a step are made of: of g_t, of a gradient for each shard of B_t, or of the gradient of another loss.

mSAM (Foret et al. 2021, m-sharpness; Behdin et al. 2023, eq. 2): G_t is the mean over the shards S_j of B_t of
grad f(x_t + eps_j; S_j), eps_j = rho h_j / ||h_j||, h_j = grad f(x_t; S_j) or, in SAMPa's timing, h_j = grad f(y_t; S_j), taken
one step earlier; y_{t+1} and the lambda part are made of their mean, g_t. A shard belongs to one process: replicas average
what comes out of their shards, never the h_j.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import Role, here
from ..functional import ratio
from ..variants import Recipe
from .buckets import Buckets
from .gradients import Backward, Sums
from .passes import Batch, Found, Pass


if TYPE_CHECKING:
    from .sampa import SAMPa
    from .sharpness_aware import SharpnessAware


MOST_DIMENSIONS = 8  # of logits

Shard = tuple[Batch, Any]  # with its weight in the mean over all shards of the update batch


class Ascents:
    """One perturbation, made of g_t itself. How SAMPa's timing takes its two gradients."""

    of_g = True  # whether x~_t is made of g_t
    carries = False  # whether it has tensors besides g_t from step to step,
    alike = False  # the same ones on all replicas

    def __init__(self, engine: SAMPa):
        self.engine = engine

    def begin(self, batch: Batch) -> None:
        """Before the step of `batch`, whose g_t there is."""

    def expect(self, batch: Batch) -> None:
        """Get to know, on all processes, the batch that the next gradients for perturbations are of."""

    def perturbed(self, ascent: Pass, batch: Batch, backward: Backward) -> Found:
        """g~_t = grad f(x~_t; B_t), on its way to the other role."""
        engine, g_tilde = self.engine, self.engine.perturbed_grads
        engine.learn(engine.moment)
        x_tilde = engine.perturb(ascent)
        return engine.gradient_at(x_tilde, Role.PERTURBED, batch, backward, g_tilde, keep_statistics=True)

    def taken(self, batch: Batch, backward: Backward, into: Buckets, y: Buckets | None = None) -> Found:
        """g_{t+1} = grad f(y_{t+1}; B_{t+1}), on its way to the other role; without `y`, at x_t."""
        if y is None:
            return self.engine.gradient(Role.LOOKAHEAD, batch, backward, into)
        return self.engine.gradient_at(y, Role.LOOKAHEAD, batch, backward, into)

    def hand_over(self) -> None:
        """Give what the next g~_t is made of besides g_t to those who compute it."""

    def carried(self) -> dict[str, Tensor]:
        """Tensors besides g_t that the next g~_t is made of, as this process's replica has them, by ``name@number``."""
        return {}

    def take_up(self, carried: dict[str, Tensor]) -> None:
        """Go on with what `carried` gave."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the replicas carry, by ``name@replica.number``: on rank 0 and, of what they carry alike, on all. A collective."""
        if not self.carries:
            return {}
        exchange, own = self.engine.exchange, self.carried()
        if self.alike:  # spread as the weights are, in a checkpoint in parts
            of_replicas = [own]
        else:
            of_all = exchange.collect({name: here(each).cpu() for name, each in own.items()})
            of_replicas = [of_all[rank] for rank in exchange.mesh.ranks_of(Role.PERTURBED)] if of_all else []
        return {name.replace("@", f"@{i}."): each for i, own in enumerate(of_replicas) for name, each in own.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> bool:
        """Take up what `state_dict` gave; returns whether all replicas' parts were in it."""
        if not self.carries:
            return True
        mesh, of_replicas = self.engine.exchange.mesh, defaultdict(dict)
        for key, each in state.items():
            name, _, place = key.partition("@")
            replica, _, number = place.rpartition(".")  # without a replica: from before there was what each has
            of_replicas[int(replica or 0)][f"{name}@{number}"] = each
        if not self.alike and len(of_replicas) < mesh.num_replicas:
            return False
        self.take_up(of_replicas[0 if self.alike else mesh.replica])
        return True


class ShardAscents(Ascents):
    """A perturbation for each shard of B_t, in both timings. Holds d numbers, and in SAMPa's timing d per shard, more."""

    of_g, carries = False, True

    def __init__(self, engine: SharpnessAware):
        super().__init__(engine)
        self._part = engine.buckets()
        self._h: list[Buckets] = []  # the h_j of B_t, on processes that are PERTURBED
        self._coming: list[Shard] = []

    def shards(self, batch: Batch) -> list[Shard]:
        """This process's shards of `batch`."""
        return self.engine.samples.shards(batch, self.engine.recipe.samples.shards)

    def expect(self, batch: Batch) -> None:
        self._coming = self.shards(batch)

    def in_turn(self, batch: Batch, backward: Backward) -> tuple[Found, Found]:
        """Means over the shards of B_t of h_j = grad f(x_t; S_j), of which there is no gradient, and g~_j = grad f(x_t + eps_j; S_j)."""
        shards, engine, ascents = self.shards(batch), self.engine, []

        def run(shard: Batch) -> Found:
            h = engine.ascent_grads
            ascents.append(engine.gradient(Role.LOOKAHEAD, shard, backward, h, local=True))
            return self._perturbed(h, ascents[-1].norm, shard, backward, batch)

        found = self._mean(
            batch, [(partial(run, shard), weight, self._part) for shard, weight in shards], engine.perturbed_grads
        )
        weights = [weight for _, weight in shards]
        loss, norm = (_weighted([getattr(each, name) for each in ascents], weights) for name in ("loss", "norm"))
        return Found(batch.fingerprint, loss, norm, torch.zeros_like(loss), found.used, norm), found

    def perturbed(self, ascent: Pass, batch: Batch, backward: Backward) -> Found:
        """Mean of the g~_j = grad f(x_t + eps_j; S_j)."""

        def run(shard: Batch, h: Buckets) -> Found:
            return self._perturbed(h, self.engine.now(batch).norm(h.views), shard, backward, batch)

        shards = zip(self.shards(batch), self._h, strict=True)
        runs = [(partial(run, shard, h), weight, self._part) for (shard, weight), h in shards]
        return self._mean(batch, runs, self.engine.perturbed_grads, theirs=self.engine.ascent_grads)

    def taken(self, batch: Batch, backward: Backward, into: Buckets, y: Buckets | None = None) -> Found:
        """The h_j at y_{t+1}, and their mean, g_{t+1}, on its way to the other role; without `y`, at x_t."""
        with nullcontext() if y is None else self.engine.displaced(y):
            return self._take(batch, backward, into, y)

    def _take(self, batch: Batch, backward: Backward, into: Buckets, theirs: Buckets | None) -> Found:
        self._h = [self.engine.buckets() for _ in self._coming]
        run = partial(self.engine.gradient, Role.LOOKAHEAD, backward=backward, local=True)
        runs = [
            (partial(run, batch=shard, into=h), weight, h)
            for (shard, weight), h in zip(self._coming, self._h, strict=True)
        ]
        return self._mean(batch, runs, into, theirs)

    def _perturbed(self, h: Buckets, norm: Tensor, shard: Batch, backward: Backward, batch: Batch) -> Found:
        """grad f(x_t + eps_j; S_j), into `_part`; the place of h_j is where the weights are displaced to."""
        engine = self.engine
        engine.ascend(h, norm, h, engine.now(batch))
        return engine.gradient_at(h, Role.PERTURBED, shard, backward, self._part, keep_statistics=True, local=True)

    @torch.no_grad()
    def _mean(
        self,
        batch: Batch,
        runs: Sequence[tuple[Callable[[], Found], Any, Buckets]],
        into: Buckets,
        theirs: Buckets | None = None,
        travels: bool = True,
    ) -> Found:
        """Of gradients, over shards and replicas.

        Args:
            batch: what the shards are of.
            runs: for each shard what computes its gradient, its weight and where the gradient is afterwards.
            into: becomes the mean.
            theirs: where the other role's gradient goes.
            travels: whether the other role wants this one.
        """
        engine, sums, found = self.engine, Sums(), []
        into.unshare()
        for bucket in range(len(into.flats)):
            into.ensure(bucket)
            into.flats[bucket].zero_()
        for run, weight, part in runs:
            with torch.enable_grad():
                found.append(run())
            torch._foreach_add_(into.flats, torch._foreach_mul(part.flats, weight))
        for bucket, flat in enumerate(into.flats):
            ready = engine.norm_of(bucket, into, sums)
            if theirs is not None:
                engine.weights.leave(bucket, theirs)
            if travels:
                engine.placement.travel(bucket, into, theirs if engine.receives else None, ready)
            else:
                engine.placement.average(flat, ready)
        engine.exchange.finish()
        weights, (norm, of_model) = [weight for _, weight, _ in runs], engine.norms(sums)
        loss = _weighted([each.loss for each in found], weights)
        # The cosine that is reported is the mean of the shards'.
        dot = norm * _weighted([ratio(each.dot, each.norm) for each in found], weights)
        used = [any(of_all) for of_all in zip(*(each.used for each in found), strict=True)]
        return Found(batch.fingerprint, loss, norm, dot, used, of_model)

    def hand_over(self) -> None:
        exchange = self.engine.exchange
        if not exchange.mesh.paired:
            return
        perturbs = Role.PERTURBED in self.engine.roles
        if perturbs:
            self._h = [self.engine.buckets() for _ in self._coming]
        for h in self._h:
            for flat in h.flats:
                mine, theirs = (None, flat) if perturbs else (flat, None)
                exchange.start(partial(exchange.transfer, mine, theirs))
        exchange.finish()

    def carried(self) -> dict[str, Tensor]:
        named = [zip(self.engine.names, self.engine.weights.whole(h.views), strict=True) for h in self._h]
        return {f"{name}@{j}": view for j, each in enumerate(named) for name, view in each}

    def take_up(self, carried: dict[str, Tensor]) -> None:
        engine = self.engine
        self._h = [engine.buckets() for _ in range(len(carried) // len(engine.params))]
        for j, h in enumerate(self._h):
            of_shard = engine.weights.parts([carried[f"{name}@{j}"] for name in engine.names])
            for view, each in zip(h.views, of_shard, strict=True):
                view.copy_(each)


class OwnLossAscents(ShardAscents):
    """For recipes whose ascent has a loss of its own, in SAMPa's timing, with the trainer's loss's gradient for y and the mix.

    B_{t+1} has two gradients at y_{t+1} then, one after the other: that of the ascent loss travels as an h_j does, that of the
    trainer's loss takes the place of their mean.
    """

    alike = True

    def shards(self, batch: Batch) -> list[Shard]:
        return [(batch, 1.0)]

    def _take(self, batch: Batch, backward: Backward, into: Buckets, theirs: Buckets | None) -> Found:
        self._h = [self.engine.buckets()]

        def mean(role: Role, into: Buckets, **travel: Any) -> Found:
            run = partial(self.engine.gradient, role, batch, backward, self._part, local=True)
            return self._mean(batch, [(run, 1.0, self._part)], into, **travel)

        mean(Role.LOOKAHEAD, self._h[0], travels=False)
        return mean(Role.PERTURBED, into, theirs=theirs)


class SlopeAscents(Ascents):
    """For recipes whose g~_t goes on from the loss's slope at the logits in the pass for g_t, which is that of y_t in SAMPa's timing.

    Slopes are on the micro-batches; those of B_{t+1} travel from the process that was at y_{t+1} to the one that will be at x~_{t+1}.
    """

    carries = True

    def __init__(self, engine: SAMPa):
        super().__init__(engine)
        self._coming: list[Any] = []  # micro-batches that g_{t+1} is of
        self._slopes: dict[int, Tensor] = {}  # theirs, but for those without a label that counts

    def begin(self, batch: Batch) -> None:
        for j, micro_batch in enumerate(batch):
            micro_batch.slope = self._slopes.get(j)

    def expect(self, batch: Batch) -> None:
        self._coming = list(batch)

    def hand_over(self) -> None:
        perturbs = Role.LOOKAHEAD not in self.engine.roles
        found = [] if perturbs else [each.slope if each.counts else None for each in self._coming]
        self._slopes = {j: slope for j, slope in enumerate(found) if slope is not None}
        if not self.engine.exchange.mesh.paired:
            return
        device = self.engine.params[0].device
        shapes = torch.zeros(len(self._coming), MOST_DIMENSIONS, dtype=torch.int64)
        for j, slope in self._slopes.items():
            shapes[j, : slope.ndim] = torch.tensor(slope.shape)
        shapes = shapes.to(device)
        self._move(shapes, perturbs)
        if perturbs:
            sizes = enumerate([size for size in shape if size] for shape in shapes.tolist())
            self._slopes = {j: torch.empty(shape, device=device) for j, shape in sizes if shape}
        for slope in self._slopes.values():
            self._move(slope.contiguous(), perturbs)

    def _move(self, tensor: Tensor, perturbs: bool) -> None:
        exchange, flat = self.engine.exchange, tensor.view(-1)
        exchange.start(partial(exchange.transfer, *((None, flat) if perturbs else (flat, None))))
        exchange.finish()

    def carried(self) -> dict[str, Tensor]:
        return {f"slope@{j}": slope for j, slope in self._slopes.items()}

    def take_up(self, carried: dict[str, Tensor]) -> None:
        device = self.engine.params[0].device
        self._slopes = {int(name.partition("@")[2]): slope.to(device) for name, slope in carried.items()}


def ascents_of(recipe: Recipe) -> type[Ascents]:
    """What SAMPa's timing needs for `recipe`."""
    if recipe.loss.separate:
        return OwnLossAscents
    if recipe.loss.keeps_slope:
        return SlopeAscents
    return ShardAscents if recipe.samples.sharded else Ascents


def _weighted(values: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum().double()
