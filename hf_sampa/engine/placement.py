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
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import here, whole
from ..functional import norms
from ..state import fingerprint_of_bits
from .buckets import Buckets


if TYPE_CHECKING:
    from ..distributed.exchange import Works
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
    in_parts, whole = False, True  # whether processes hold parts of x_t, and whether it is whole here nevertheless

    def __init__(self, engine: SharpnessAware):
        self.params, self.weights, self.of_model = engine.params, engine.weights, engine.of_model
        self.exchange, self.optimizer = engine.exchange, engine.base_optimizer
        self.ascent_grads, self.perturbed_grads = engine.ascent_grads, engine.perturbed_grads
        self.members = self.ascent_grads.members
        self.owners = owners(self.ascent_grads.sizes, self._owner_count())
        self._place(range(len(self.members)), range(len(self.members)))

    def _place(self, owned: Sequence[int], landed: Sequence[int]) -> None:
        self.owned, self.landed = owned, landed
        self.updated, self.held = self._params_in(owned), self._params_in(landed)

    def _params_in(self, buckets: Sequence[int]) -> list[int]:
        return sorted(i for bucket in buckets for i in self.members[bucket])

    def close(self) -> None:
        """Let go of what it hung onto the optimizer."""

    # ---- Displaced weights ----

    def spread(
        self,
        write_lookahead: Callable[[Buckets], None],
        write_perturbed: Callable[..., None] | None,
        ascent_is_read: bool,
    ) -> None:
        """Before the two passes of a pair: what a process needs whole, and holds in part, comes to it.

        Args:
            write_lookahead: writes y_{t+1} of the parameters that this process updates.
            write_perturbed: writes x~_t of all parameters, or of those that it is told; None where that takes more of g_t than
                their own.
            ascent_is_read: whether x~_t is made of g_t.
        """

    def perturb(self, write_perturbed: Callable[..., None], x_tilde: Buckets) -> None:
        """Make x~_t, whole, in `x_tilde`."""
        write_perturbed(x_tilde)

    def look_ahead(self, write_lookahead: Callable[[Buckets], None]) -> None:
        """Turn g_t into y_{t+1}, whole, in its place."""
        write_lookahead(self.ascent_grads)

    def displacement_dot(self, bucket: int, weights: Buckets, x: list[Tensor], grad: Tensor) -> Tensor:
        """As in `Weights`, or a part of it, of which `dot_left` is the rest."""
        return self.weights.displacement_dot(bucket, weights, x, grad)

    def dot_left(self) -> Tensor | float:
        """What `displacement_dot` has left out of <x~_t - x_t, g~_t> over what this process updates, once g~_t has landed."""
        return 0.0

    # ---- Gradients ----

    def travel(self, bucket: int, mine: Buckets, theirs: Buckets | None, ready: Callable[[], None]) -> None:
        """Begin to average a bucket of a gradient over replicas and to exchange it with the other role.

        Args:
            bucket: its index.
            mine: this role's gradient.
            theirs: where the other role's goes; None where none is on its way.
            ready: called once `mine` is the mean.
        """
        exchange, grad, place = self.exchange, mine.flats[bucket], None if theirs is None else theirs.flats[bucket]
        swap = partial(exchange.transfer, grad, place)
        if not exchange.mesh.paired:
            self.average(grad, ready)
        elif not self._adds_up:
            ready()
            exchange.start(swap)
        else:
            replica = self._replica_of(bucket)
            both = [each for each in (grad, place) if each is not None]
            exchange.start(
                partial(exchange.add_up, grad, replica),
                partial(self._where_added_up, replica, grad, swap),
                lambda: [work for each in both for work in exchange.hand_out(each, replica)],
                ready,
            )

    def _where_added_up(self, replica: int, grad: Tensor, go_on: Callable[[], Works]) -> Works:
        """`go_on` with the mean, in the one process of this role that has the sum."""
        if self.exchange.mesh.replica != replica:
            return ()
        grad.div_(self.exchange.mesh.num_replicas)
        return go_on()

    def receive(self, into: Buckets) -> None:
        """The other role's gradient, where this process runs no pass."""
        exchange = self.exchange
        for bucket in self.landed:
            into.ensure(bucket)
            place = into.flats[bucket]
            if not self._adds_up:
                exchange.start(partial(exchange.transfer, None, place))
                continue
            replica = self._replica_of(bucket)
            legs = [partial(exchange.transfer, None, place)] if exchange.mesh.replica == replica else [tuple]
            exchange.start(*legs, partial(exchange.hand_out, place, replica))
        exchange.finish()

    def average(self, grad: Tensor, ready: Callable[[], None] = lambda: None) -> None:
        """Begin to average ``(n,)`` over the replicas of this role; `ready` is called once it is the mean."""
        if not self._adds_up:
            ready()
            return

        def divide() -> None:
            grad.div_(self.exchange.mesh.num_replicas)
            ready()

        self.exchange.start(partial(self.exchange.sum_over_replicas, grad), divide)

    @property
    def _adds_up(self) -> bool:
        """Whether gradients of several replicas are added up here, and not by FSDP2."""
        return self.exchange.mesh.num_replicas > 1 and not self.weights.sharded

    def _owner_count(self) -> int:
        """Among how many processes buckets are dealt out; shards among the two halves of a pair."""
        return 2 if self.weights.sharded else self.exchange.mesh.world_size

    def _replica_of(self, bucket: int) -> int:
        """Where a bucket of a gradient is added up, in both roles."""
        return self.exchange.mesh.replica_of(self.owners[bucket])

    def keep_landed(self, grads: Buckets) -> None:
        """Let go of the memory for what does not land here."""
        for bucket in set(range(len(self.members))).difference(self.landed):
            grads.release(bucket)

    # ---- Norms ----

    def of_all(self, numbers: Sequence[Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        """Numbers of all parameters, ``(parameters, *shape)`` in double precision, given those of the parameters that this process updates."""
        return self.weights.of_sums(torch.stack(list(numbers)).double())

    def in_any_replica(self, own: Tensor) -> Tensor:
        """Numbers ``(n,)`` of at least 0 of this role, given those that this process has, and 0 for the others."""
        return own

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

    # ---- The weights, between steps ----

    def hold_parts(self) -> None:
        """From here on nothing reads the model between steps without `gather_weights`."""

    def gather_weights(self) -> None:
        """Before something outside of a step reads the model: make x_t whole here. A collective, where it was not."""

    def lose_parts(self) -> bool:
        """After an exception: let whoever reads weights that are not here read NaN; whether there are any, until `gather_weights`."""
        return False

    def digest_of_weights(self) -> Tensor:
        """A number ``()`` that is the same on all processes that began the step at the same weights."""
        return fingerprint_of_bits(self.weights.here())

    # ---- Checkpoints: whole, whoever writes them ----

    def whole_grads(self, grads: Buckets) -> list[Tensor]:
        """All of what landed of g_t, in several processes perhaps. A collective."""
        return grads.views

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


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Who of `count` updates each bucket, so that all update about as much: largest first, each to who has least."""
    found, owned = [0] * len(sizes), [0] * count
    for bucket in sorted(range(len(sizes)), key=lambda bucket: -sizes[bucket]):
        found[bucket] = min(range(count), key=owned.__getitem__)
        owned[found[bucket]] += sizes[bucket]
    return found
