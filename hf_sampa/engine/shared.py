"""One base optimizer for several processes, each of which steps a part of the parameters: ZeRO stage 1 (Rajbhandari et al. 2020).

The SAMPa paper leaves it as an open question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import Role
from ..functional import wide_inner
from ..variants import Recipe
from .buckets import Buckets, in_memory_order, is_dense
from .placement import Placement
from .weights import nothing_like


if TYPE_CHECKING:
    from ..distributed.exchange import Works
    from .sharpness_aware import SharpnessAware


class Shared(Placement):
    """Each process updates a part of the parameters, whole buckets of them, and holds that part of m_t.

    In SAMPa's timing it holds that part of g_t, g~_t and G_t, too, unless the recipe's arithmetic needs them whole. With 2k
    processes and d trainable weights it sends, on average, d/2k and (k - 1)/k d displaced weights, (k - 1)/k d and d/2k numbers of a
    gradient, and the updated weights, as many as of the displaced ones. Those it leaves out once it is to `hold_parts`: whoever then
    reads weights that others update reads NaN, until `gather_weights`.

    The base optimizer must be one that `check_separable` lets pass. After a step ``.grad`` is set for the process's own part only.
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
        self._mine = int(mesh.roles[0]) if self.weights.sharded else mesh.rank
        owned = [bucket for bucket, owner in enumerate(self.owners) if owner == self._mine]
        self._halves = mesh.paired and engine.recipe.by_entries
        self._can_hold_parts = self._halves and engine.recipe.scales and not self.weights.sharded
        self._place(owned, owned if self._halves else range(len(self.members)))
        self.foreign = [bucket for bucket, owner in enumerate(self.owners) if owner != self._mine]
        self._rounds = self._deal_out() if mesh.paired else []
        self._made = False  # whether x~_t of this step is made by who updates it
        self._updates = 0  # of the weights, by this process
        self.keep_landed(self.perturbed_grads)
        shares = self.optimizer.register_step_post_hook(lambda *_: self._share_weights())
        # Before the hooks that are there already: they are to see x_{t+1}.
        self.optimizer._optimizer_step_post_hooks.move_to_end(shares.id, last=False)
        self._hooks = [shares, self.optimizer.register_step_pre_hook(lambda *_: self._check_untouched())]
        self._left: list[tuple[Tensor, int]] | None = None  # parts of G_t as they were left, with their versions

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for bucket in self.foreign if self.in_parts else ():
            for i in self.members[bucket]:
                self.params[i].data = self.params[i].data.clone()  # not a part of a bucket any more

    def _rank_of(self, owner: int, shard: int = 0) -> int:
        """The first rank that updates what `owner` does, of those that hold a shard."""
        return self.exchange.mesh.ranks_of(Role(owner))[shard] if self.weights.sharded else owner

    def _deal_out(self) -> list[tuple[int | None, tuple[int | None, int | None]]]:
        """Which pair (None: each for itself) swaps which two buckets, of its PERTURBED and its LOOKAHEAD half, pair by pair in turn."""
        mesh = self.exchange.mesh
        pairs = [(Role.PERTURBED, Role.LOOKAHEAD)]
        if not self.weights.sharded:
            pairs = list(zip(*(mesh.ranks_of(role) for role in Role), strict=True))
        found = []
        for replica, pair in enumerate(pairs):
            of_pair = zip_longest(*([b for b, owner in enumerate(self.owners) if owner == each] for each in pair))
            found += [(i, None if self.weights.sharded else replica, both) for i, both in enumerate(of_pair)]
        return [each[1:] for each in sorted(found, key=lambda each: each[0])]

    # ---- Displaced weights ----

    def spread(
        self,
        write_lookahead: Callable[[Buckets], None],
        write_perturbed: Callable[..., None] | None,
        ascent_is_read: bool,
    ) -> None:
        if not self.exchange.mesh.paired:
            return
        if self.in_parts:
            self._began_at = self.digest_of_weights() if self.whole else torch.zeros(()).long()
            self._hide()
        lent, place = self.perturbed_grads, self.ascent_grads  # nothing is in the first before the passes
        for bucket in self.owned:
            lent.ensure(bucket)  # a pass that failed leaves large ones released
        write_lookahead(lent)
        self._made = self._halves and write_perturbed is not None
        if self._made:
            write_perturbed(place, self.updated)
        to_perturb = self._halves and ascent_is_read
        if self.exchange.mesh.roles[0] is Role.PERTURBED:
            self._deal(given=lent, taken=place if to_perturb else None)
        else:
            place.swap(lent, self.owned)
            self._deal(given=lent if to_perturb else None, taken=place)

    def perturb(self, write_perturbed: Callable[..., None], x_tilde: Buckets) -> None:
        if not self._made:
            super().perturb(write_perturbed, x_tilde)

    def look_ahead(self, write_lookahead: Callable[[Buckets], None]) -> None:
        """Nothing: `spread` has done it."""

    def _deal(self, given: Buckets | None, taken: Buckets | None) -> None:
        """Give the other role the own buckets of `given`, and bring all buckets of `taken` to all of this role."""
        for replica, both in self._rounds:
            self.exchange.start(
                partial(self._swap, given, taken, replica, both), partial(self._hand_out, taken, replica, both), tuple
            )
        self.exchange.finish()

    def _swap(
        self, given: Buckets | None, taken: Buckets | None, replica: int | None, both: tuple[int | None, int | None]
    ) -> Works:
        if replica not in (None, self.exchange.mesh.replica):
            return ()
        own, foreign = both if self.exchange.mesh.roles[0] is Role.PERTURBED else both[::-1]
        sent = None if given is None or own is None else given.flats[own]
        return self.exchange.transfer(sent, None if taken is None or foreign is None else taken.flats[foreign])

    def _hand_out(self, taken: Buckets | None, replica: int | None, both: tuple[int | None, int | None]) -> Works:
        if taken is None or not self._adds_up:
            return ()
        buckets = [bucket for bucket in both if bucket is not None]
        return [work for bucket in buckets for work in self.exchange.hand_out(taken.flats[bucket], replica)]

    def displacement_dot(self, bucket: int, weights: Buckets, x: list[Tensor], grad: Tensor) -> Tensor:
        if not self._can_hold_parts:
            return super().displacement_dot(bucket, weights, x, grad)
        # x_t may be elsewhere, and is not asked for where it is here, which would be a sum of other roundings.
        return wide_inner(weights.flats[bucket], grad)

    def dot_left(self) -> Tensor | float:
        if not self._can_hold_parts:
            return 0.0
        own = [(self.params[i].detach(), self.perturbed_grads.views[i]) for i in self.updated]
        return -sum(wide_inner(in_memory_order(x), in_memory_order(g_tilde)) for x, g_tilde in own)

    # ---- Gradients ----

    def travel(self, bucket: int, mine: Buckets, theirs: Buckets | None, ready: Callable[[], None]) -> None:
        if not self._halves:
            super().travel(bucket, mine, theirs, ready)
            return
        exchange, grad, is_own = self.exchange, mine.flats[bucket], bucket in self.owned
        place = theirs.flats[bucket] if is_own and theirs is not None else None

        def swap() -> Works:
            ready()
            return exchange.transfer(None if is_own else grad, place)

        legs = [swap] if is_own else [swap, partial(self._release, mine, bucket)]
        if self._adds_up:
            replica = self._replica_of(bucket)
            legs[0] = partial(self._where_added_up, replica, grad, swap)
            legs.insert(0, partial(exchange.add_up, grad, replica))
        exchange.start(*legs)

    def receive(self, into: Buckets) -> None:
        if not self._halves:
            super().receive(into)
            return
        for bucket in self.landed:
            into.ensure(bucket)
            self.exchange.start(partial(self.exchange.transfer, None, into.flats[bucket]))
        self.exchange.finish()

    def _release(self, grads: Buckets, bucket: int) -> None:
        for i in self.members[bucket]:
            self.params[i].grad = None
        grads.release(bucket)

    def in_any_replica(self, own: Tensor) -> Tensor:
        return self.exchange.gather_in_role(own).amax(dim=0) if self._halves and self._adds_up else own

    def of_all(self, numbers: Sequence[Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        """As in `Placement`. A collective."""
        own = torch.zeros(len(self.params), *shape, dtype=torch.float64, device=self.params[0].device)
        if numbers:  # of few parameters some processes update none
            own[self.updated] = torch.stack(list(numbers)).double()
        rows = self.exchange.gather(own.flatten()).view(-1, *own.shape)
        shard = self.exchange.mesh.replica % self.weights.count
        ranks = torch.tensor([self._rank_of(self.owners[bucket], shard) for bucket in self.ascent_grads.bucket_of])
        return self.weights.of_sums(rows[ranks, torch.arange(len(self.params))])

    def in_any_process(self, own: Tensor) -> Tensor:
        return self.exchange.gather(own)[self.exchange.mesh.alike(self.weights.count)].amax(dim=0)

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

    def _share_weights(self) -> None:
        """Give all processes the parts of x_{t+1}, unless each is to hold its own."""
        self._updates += 1
        if self.in_parts:
            self._hide()
        else:
            # What is not needed any more: the displaced weights, or G_t.
            free = self.ascent_grads if self._halves or not self.exchange.mesh.paired else self.perturbed_grads
            self._bring_weights(free)

    def hold_parts(self) -> None:
        """From here on x_t is held for what this process updates; displaced weights of the rest are where x_t of it would be."""
        if not self._can_hold_parts:
            return
        self.in_parts = True
        for i in self._elsewhere():
            self.params[i].data = self.ascent_grads.views[i].copy_(self.params[i].detach())

    def _elsewhere(self) -> Iterator[int]:
        """Parameters of which x_t is, or was, not here, with room for it."""
        for bucket in self.foreign:
            self.ascent_grads.ensure(bucket)
            yield from self.members[bucket]

    def _hide(self) -> None:
        """Let whoever reads weights that are not here any more read NaN, and nobody write to them."""
        if self.whole:
            for i in self._elsewhere():
                self.params[i].data = nothing_like(self.params[i])
        self.whole = False

    def _show(self) -> None:
        for i in self._elsewhere():
            self.params[i].data = self.ascent_grads.views[i]

    def gather_weights(self) -> None:
        if self.whole:
            return
        updates = self.exchange.share_objects(self._updates)
        if len(set(updates)) > 1:
            raise RuntimeError(
                "shard_optimizer: expected parts of the weights after the same update, got those after "
                f"{', '.join(f'{each} on rank {rank}' for rank, each in enumerate(updates))}, since an exception came in the middle of one. "
                "Start again with resume_from_checkpoint=True."
            )
        self._show()
        self._bring_weights(self.ascent_grads)
        self.whole = True

    def lose_parts(self) -> bool:
        lost = not self.whole
        if lost:
            # Tensors with room for what `gather_weights` brings; another trainer of this model finds them, too.
            self._show()
            for bucket in self.foreign:
                self.ascent_grads.flats[bucket].fill_(float("nan"))
        self.whole = not self.in_parts  # others may have lost some: all gather them, or none does
        return lost

    def digest_of_weights(self) -> Tensor:
        return super().digest_of_weights() if self.whole else self._began_at

    @torch.no_grad()
    def _bring_weights(self, into: Buckets) -> None:
        """The weights of this process to all others, and theirs, by way of `into`, to this one."""
        for bucket, owner in enumerate(self.owners):
            if owner == self._mine:
                self.exchange.start(partial(self._give, self._packed(bucket), owner), tuple)
            else:
                into.ensure(bucket)
                self.exchange.start(
                    partial(self._give, into.flats[bucket], owner), partial(self._unpack, into, bucket)
                )
        self.exchange.finish()

    def _give(self, flat: Tensor, owner: int) -> Works:
        """`flat` of its owner to all who have none of it."""
        if not self.weights.sharded:
            return self.exchange.hand_out_to_all(flat, owner)
        return self.exchange.transfer(flat, None) if owner == self._mine else self.exchange.transfer(None, flat)

    @torch.no_grad()
    def _unpack(self, packed: Buckets, bucket: int) -> None:
        if not self.in_parts:
            torch._foreach_copy_(packed.among(self.weights.here(), bucket), packed.among(packed.views, bucket))

    def _packed(self, bucket: int) -> Tensor:
        """The weights of a bucket, ``(n,)``; those of a large parameter where they are, without a copy."""
        params = self.ascent_grads.among(self.weights.here(), bucket)
        if len(params) == 1 and is_dense(params[0]):
            return in_memory_order(params[0].detach())
        packed = self.ascent_grads.room(bucket)
        torch._foreach_copy_(self.ascent_grads.cut(bucket, packed), params)
        return packed

    # ---- Checkpoints ----

    def whole_grads(self, grads: Buckets) -> list[Tensor]:
        if not self._halves:
            return grads.views
        into = self.perturbed_grads if self.in_parts else grads
        for bucket, owner in enumerate(self.owners):
            place = grads if owner == self._mine else into
            place.ensure(bucket)
            self.exchange.start(partial(self._give, place.flats[bucket], owner), tuple)
        self.exchange.finish()
        found = list(into.views)
        for i in self.updated:
            found[i] = grads.views[i]
        if self.in_parts:
            self.keep_landed(into)
        return found

    def _whole_state(self) -> dict[Tensor, dict]:
        found, mesh = super()._whole_state(), self.exchange.mesh
        for bucket, members in enumerate(self.members):
            source = self._rank_of(self.owners[bucket])  # further pairs hold the same
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


def check_separable(optimizer: Optimizer) -> None:
    """Raise ValueError where the step of a parameter may depend on other parameters."""
    known = [getattr(torch.optim, name) for name in SEPARABLE]
    if type(optimizer) not in known:
        raise ValueError(
            f"shard_optimizer: expected an optimizer that treats every parameter on its own, one of {', '.join(SEPARABLE)} "
            f"of torch.optim, got {type(optimizer).__module__}.{type(optimizer).__name__}. Use one of them, or leave shard_optimizer out."
        )


def check_whole(recipe: Recipe) -> None:
    """Raise ValueError where a part of `recipe` reads the optimizer's state, of which each process then holds a part."""
    if recipe.direction.reads_optimizer:
        raise ValueError(
            f"shard_optimizer: expected a variant that does not read the optimizer's state, but {type(recipe.direction).__name__} makes the "
            "perturbation of it, and each process would hold a part. Leave shard_optimizer out, or take another variant."
        )


SEPARABLE = ("Adafactor", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
