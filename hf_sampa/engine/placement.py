"""Where the numbers of a run live: who updates and holds what, and how what lies elsewhere comes to where it is needed.

The algorithm computes, a placement moves. Neither timing nor recipe knows which one they run on, and every bit is the same;
a placement asks a recipe one thing, whether half of the gradients is enough for it (`Recipe.by_entries`).
A placement answers: which numbers are mine, what writing displaced weights means, where a gradient lands and travels, what
a norm over all is, and how what is spread becomes whole for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import Role, here, whole
from ..functional import norms
from .buckets import Buckets, in_memory_order


if TYPE_CHECKING:
    from .sharpness_aware import SharpnessAware


class Placement:
    """Everything whole in every process.

    Args:
        engine: whose parameters, buckets, exchange and base optimizer it places.

    Attributes:
        owned: buckets that this process updates, and whose optimizer state it holds.
        landed: buckets of which a step's gradients end on this process.
        updated, held: the parameters in those.
    """

    shared = False  # whether one base optimizer is spread over several processes

    def __init__(self, engine: SharpnessAware):
        self.params, self.weights, self.of_model = engine.params, engine.weights, engine.of_model
        self.exchange, self.optimizer = engine.exchange, engine.base_optimizer
        self.ascent_grads, self.perturbed_grads = engine.ascent_grads, engine.perturbed_grads
        self.members = self.ascent_grads.members
        self._place(range(len(self.members)), range(len(self.members)))

    def _place(self, owned: Sequence[int], landed: Sequence[int]) -> None:
        self.owned, self.landed = owned, landed
        self.updated, self.held = self._params_in(owned), self._params_in(landed)

    def _params_in(self, buckets: Sequence[int]) -> list[int]:
        return sorted(i for bucket in buckets for i in self.members[bucket])

    def close(self) -> None:
        """Let go of what it hung onto the optimizer."""

    # ---- Displaced weights ----

    def spread(self, write_lookahead: Callable[[Buckets], None], ascent_is_read: bool) -> None:
        """Before the two passes of a pair: what a process needs whole, and holds in part, comes to it.

        Args:
            write_lookahead: writes y_{t+1} of the parameters that this process updates.
            ascent_is_read: whether x~_t is made of g_t.
        """

    def look_ahead(self, write_lookahead: Callable[[Buckets], None]) -> None:
        """Turn g_t into y_{t+1}, whole, in its place."""
        write_lookahead(self.ascent_grads)

    # ---- Gradients ----

    def travel(self, bucket: int, mine: Buckets, theirs: Buckets | None, ready: Callable[[], None]) -> None:
        """Begin to average a bucket of a gradient over replicas and to exchange it with the other role.

        Args:
            bucket: its index.
            mine: this role's gradient.
            theirs: where the other role's goes; None where none is on its way.
            ready: called once `mine` is the mean, before it is sent.
        """
        place = None if theirs is None else theirs.flats[bucket]
        self.exchange.start(mine.flats[bucket], place, mean=self.weights.sharded, ready=ready)

    def receive(self, into: Buckets) -> None:
        """The other role's gradient, where this process runs no pass."""
        for bucket in self.landed:
            into.ensure(bucket)
            self.exchange.transfer(None, into.flats[bucket])
        self.exchange.finish()

    def keep_landed(self, grads: Buckets) -> None:
        """Let go of the memory for what does not land here."""
        for bucket in set(range(len(self.members))).difference(self.landed):
            grads.release(bucket)

    # ---- Norms ----

    def of_all(self, numbers: Sequence[Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        """Numbers of all parameters, ``(parameters, *shape)`` in double precision, given those of the parameters that this process updates."""
        return self.weights.of_sums(torch.stack(list(numbers)).double())

    def in_any_process(self, own: Tensor) -> Tensor:
        """Numbers ``(n,)`` of at least 0, given those that this process has, and 0 for the others."""
        return own

    def grad_norm(self, reached: set[int], wide: bool) -> Tensor:
        """||G_t|| of the model over all parts, from ``.grad``; the bits of `torch.nn.utils.get_total_norm`, but where that is infinity.

        Args:
            reached: parameters of which G_t has a part, on whichever process.
            wide: whether it may be infinity.
        """
        of_model = [i for i in sorted(reached) if i < self.of_model]
        mine = sorted(set(of_model).intersection(self.updated))

        def of_parts(found: Callable[[list[Tensor]], Tensor]) -> Tensor:
            own = torch.zeros(self.of_model, dtype=torch.float64, device=self.params[0].device)
            if mine:
                own[mine] = found([here(self.params[i].grad) for i in mine])
            return self.weights.of_norms(self.in_any_process(own))[of_model]

        parts = of_parts(lambda grads: torch.stack(torch._foreach_norm(grads)).double())
        # In the parameters' precisions, by which torch groups them.
        alike = [part.to(self.params[i].dtype) for i, part in zip(of_model, parts, strict=True)]
        norm = torch.nn.utils.get_total_norm(alike)
        return norms([of_parts(norms)])[0] if wide and norm.isinf() else norm

    def clip_grad_norm_(self, reached: set[int], max_norm: float, wide: bool) -> Tensor:
        """Clip the own part of G_t by the norm of the whole, which is returned; see `grad_norm`."""
        norm = self.grad_norm(reached, wide)
        own = [self.params[i] for i in self.updated if i < self.of_model]
        if self.weights.sharded:
            own = [SimpleNamespace(grad=here(param.grad)) for param in own if param.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(own, max_norm, norm)
        return norm

    # ---- Checkpoints: whole, whoever writes them ----

    def make_whole(self, grads: Buckets) -> None:
        """Bring together what landed in several processes. A collective."""

    @contextmanager
    def whole_optimizer(self) -> Iterator[None]:
        """Within the block rank 0's base optimizer holds the whole state of all parameters. A collective."""
        state = self.optimizer.state
        own = {param: state[param] for param in self.params if param in state}
        state.update(self._whole_state())
        try:
            yield
        finally:
            state.update(own)
            self.drop_foreign_state()

    def _whole_state(self) -> dict[Tensor, dict]:
        """On rank 0, by parameter, state of which it has none, or a part."""
        if not self.weights.sharded:
            return {}
        found = {param: self._whole_of(i) for i, param in enumerate(self.params)}
        return {param: each for param, each in found.items() if each} if self.exchange.mesh.rank == 0 else {}

    def _whole_of(self, i: int) -> dict | None:
        """State of one parameter, on the CPU; of a sharded one a collective of those that hold parts."""
        state = self.optimizer.state.get(self.params[i])
        return state and {
            key: whole(value).cpu() if isinstance(value, Tensor) else value for key, value in state.items()
        }

    def drop_foreign_state(self) -> None:
        """Forget the optimizer state of what other processes update."""


class Shared(Placement):
    """One base optimizer for several processes, each of which steps a part of the parameters and holds that part of m_t.

    ZeRO stage 1 (Rajbhandari et al. 2020), which the SAMPa paper leaves as an open question: across each pair, or, in SAM's
    timing, across all processes. Whole buckets at a time. After a step ``.grad`` is set for the process's own part only;
    once the base optimizer has stepped it, the parts of x_{t+1} are exchanged.

    A pair holds g_t, g~_t and G_t in halves, too, unless the recipe's arithmetic needs them whole. With d trainable weights
    a process then sends d/2 look-ahead weights or numbers of g_t, d/2 of a gradient and d/2 updated weights per step.

    The base optimizer must be one that `check_separable` lets pass.
    """

    shared = True

    def __init__(self, engine: SharpnessAware):
        super().__init__(engine)
        mesh = self.exchange.mesh
        if self.weights.sharded and not mesh.paired:
            raise ValueError(
                "shard_optimizer: expected method='sampa' beside FSDP, got 'sam', under which FSDP spreads the optimizer over all "
                "processes already. Leave shard_optimizer out."
            )
        self._mine = int(mesh.roles[0]) if mesh.paired else mesh.rank
        self._owners = owners(self.ascent_grads.sizes, 2 if mesh.paired else mesh.world_size)
        owned = [bucket for bucket, owner in enumerate(self._owners) if owner == self._mine]
        self._halves = mesh.paired and engine.recipe.by_entries
        self._place(owned, owned if self._halves else range(len(self.members)))
        self.foreign = [bucket for bucket, owner in enumerate(self._owners) if owner != self._mine]
        self.keep_landed(self.perturbed_grads)
        shares = self.optimizer.register_step_post_hook(lambda *_: self._share_weights())
        # Before the hooks that are there already: they are to see x_{t+1}.
        self.optimizer._optimizer_step_post_hooks.move_to_end(shares.id, last=False)
        self._hooks = [shares, self.optimizer.register_step_pre_hook(lambda *_: self._check_untouched())]
        self._left: list[tuple[Tensor, int]] | None = None  # parts of G_t as they were left, with their versions

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _rank_of(self, owner: int, shard: int = 0) -> int:
        """The first rank that updates what `owner` does, of those that hold a shard."""
        mesh = self.exchange.mesh
        return mesh.ranks_of(Role(owner))[shard] if mesh.paired else owner

    # ---- Displaced weights ----

    def spread(self, write_lookahead: Callable[[Buckets], None], ascent_is_read: bool) -> None:
        if not self.exchange.mesh.paired:
            return
        lent = self.perturbed_grads  # nothing is in it before the passes
        for bucket in self.owned:
            lent.ensure(bucket)  # a pass that failed leaves large ones released
        write_lookahead(lent)
        g = self.ascent_grads if self._halves and ascent_is_read else None
        if self._mine == Role.PERTURBED:
            self._swap(given=lent, taken=g)
        else:
            self._swap(given=g, taken=self.ascent_grads)
            self.ascent_grads.swap(lent, self.owned)

    def look_ahead(self, write_lookahead: Callable[[Buckets], None]) -> None:
        """Nothing: `spread` has done it."""

    def _swap(self, given: Buckets | None, taken: Buckets | None) -> None:
        """Send the owned buckets of `given` to the other half of the pair, whose buckets go into `taken`."""
        for own, foreign in zip_longest(self.owned, self.foreign):
            sent = given is not None and own is not None
            received = taken is not None and foreign is not None
            self.exchange.transfer(given.flats[own] if sent else None, taken.flats[foreign] if received else None)
        self.exchange.finish()

    # ---- Gradients ----

    def travel(self, bucket: int, mine: Buckets, theirs: Buckets | None, ready: Callable[[], None]) -> None:
        if not self._halves:
            super().travel(bucket, mine, theirs, ready)
        elif bucket in self.owned:
            place = None if theirs is None else theirs.flats[bucket]
            self.exchange.start(mine.flats[bucket], place, send=False, mean=self.weights.sharded, ready=ready)
        else:
            sent = partial(self._release, mine, bucket)
            self.exchange.start(mine.flats[bucket], mean=self.weights.sharded, ready=ready, sent=sent)

    def _release(self, grads: Buckets, bucket: int) -> None:
        for i in self.members[bucket]:
            self.params[i].grad = None
        grads.release(bucket)

    def of_all(self, numbers: Sequence[Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        """As in `Placement`. A collective."""
        own = torch.zeros(len(self.params), *shape, dtype=torch.float64, device=self.params[0].device)
        if numbers:  # of few parameters some processes update none
            own[self.updated] = torch.stack(list(numbers)).double()
        rows = self.exchange.gather(own.flatten()).view(-1, *own.shape)
        shard = self.exchange.mesh.rank % self.weights.count
        ranks = torch.tensor([self._rank_of(self._owners[bucket], shard) for bucket in self.ascent_grads.bucket_of])
        return self.weights.of_sums(rows[ranks, torch.arange(len(self.params))])

    def in_any_process(self, own: Tensor) -> Tensor:
        shards, rank = self.weights.count, self.exchange.mesh.rank
        return self.exchange.gather(own)[rank % shards :: shards].amax(dim=0)

    def clip_grad_norm_(self, reached: set[int], max_norm: float, wide: bool) -> Tensor:
        norm = super().clip_grad_norm_(reached, max_norm, wide)
        self.note_gradients()
        return norm

    def note_gradients(self) -> None:
        """Take note of what is in ``.grad``: nobody else is to change it before the base optimizer's step."""
        grads = [self.params[i].grad for i in self.updated]
        self._left = [(grad, grad._version) for grad in grads if grad is not None]

    def _check_untouched(self) -> None:
        grads = [self.params[i].grad for i in self.updated]
        now = [(grad, grad._version) for grad in grads if grad is not None]
        before, self._left = self._left, None
        if before is not None and [(id(g), v) for g, v in now] != [(id(g), v) for g, v in before]:
            raise ValueError(
                "shard_optimizer: expected gradients that are left alone before the optimizer's step, but a callback or a hook "
                "changed them: each process has a part of G_t only, by whose norm it would clip or scale. Set max_grad_norm, by which "
                "the whole is clipped, or leave shard_optimizer out."
            )

    # ---- The update ----

    @torch.no_grad()
    def _share_weights(self) -> None:
        """Exchange the parts of x_{t+1}, a bucket at a time."""
        if not self.exchange.mesh.paired:
            for bucket, owner in enumerate(self._owners):
                self.exchange.broadcast(self.ascent_grads.among(self.weights.here(), bucket), source=owner)
            return
        # The other half of what is not needed any more: of the displaced weights, or of G_t.
        free = self.ascent_grads if self._halves else self.perturbed_grads
        for own, foreign in zip_longest(self.owned, self.foreign):
            if foreign is not None:
                free.ensure(foreign)
            self.exchange.transfer(
                None if own is None else self._packed(own), None if foreign is None else free.flats[foreign]
            )
            self.exchange.finish()
            if foreign is not None:
                torch._foreach_copy_(free.among(self.weights.here(), foreign), free.among(free.views, foreign))

    def _packed(self, bucket: int) -> Tensor:
        """The weights of a bucket, ``(n,)``; those of a large parameter where they are, without a copy."""
        params, views = (
            self.ascent_grads.among(each, bucket) for each in (self.weights.here(), self.ascent_grads.views)
        )
        if len(params) == 1 and params[0].stride() == views[0].stride():
            return in_memory_order(params[0].detach())
        packed = torch.empty_like(self.ascent_grads.flats[bucket])
        torch._foreach_copy_(self.ascent_grads.cut(bucket, packed), params)
        return packed

    # ---- Checkpoints ----

    def make_whole(self, grads: Buckets) -> None:
        if self._halves:
            self._swap(grads, grads)

    def _whole_state(self) -> dict[Tensor, dict]:
        found, mesh = super()._whole_state(), self.exchange.mesh
        for bucket, members in enumerate(self.members):
            source = self._rank_of(self._owners[bucket])  # further pairs hold the same
            holds = bucket in self.owned if self.weights.sharded else mesh.rank == source
            own = [self._whole_of(i) for i in members] if holds else None
            of_all = self.exchange.collect(own if mesh.rank == source else None)
            if mesh.rank == 0 and source:
                values = zip(members, of_all[source], strict=True)
                found |= {self.params[i]: value for i, value in values if value}
        return found

    def drop_foreign_state(self) -> None:
        for bucket in self.foreign:
            for i in self.members[bucket]:
                self.optimizer.state.pop(self.params[i], None)


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Who of `count` updates each bucket, so that all update about as much: largest first, each to who has least."""
    found, owned = [0] * len(sizes), [0] * count
    for bucket in sorted(range(len(sizes)), key=lambda bucket: -sizes[bucket]):
        found[bucket] = min(range(count), key=owned.__getitem__)
        owned[found[bucket]] += sizes[bucket]
    return found


def check_separable(optimizer: Optimizer) -> None:
    """Raise ValueError where the step of a parameter may depend on other parameters."""
    known = [getattr(torch.optim, name) for name in SEPARABLE]
    if type(optimizer) not in known:
        raise ValueError(
            f"shard_optimizer: expected an optimizer that treats every parameter on its own, one of {', '.join(SEPARABLE)} "
            f"of torch.optim, got {type(optimizer).__module__}.{type(optimizer).__name__}. Use one of them, or leave shard_optimizer out."
        )


SEPARABLE = ("Adafactor", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
