"""One base optimizer for both processes of a pair: each steps half of the parameters and holds half of m_t and g_t.

ZeRO stage 1 (Rajbhandari et al. 2020) across the pair, which the SAMPa paper leaves as an open question. With d trainable
weights a process sends d/2 displaced weights, d/2 gradients and d/2 updated weights per step; every bit is the same as
with `hf_sampa.engine.sampa.SAMPa`, whose arithmetic this is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from ..distributed import Role
from .buckets import Buckets
from .passes import Pass
from .sampa import SAMPa


class ShardedSAMPa(SAMPa):
    """`SAMPa` on a pair whose processes own half of the parameters each, whole buckets at a time.

    After a step, ``.grad`` is set for the owned parameters only; once the base optimizer has stepped them, the halves of
    x_{t+1} are exchanged. Takes what `SAMPa` takes.

    The base optimizer must be one that `check_separable` lets pass.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        owners = halves([flat.numel() for flat in self.ascent_grads.flats])
        self.owned = [bucket for bucket, role in enumerate(owners) if role is self.roles[0]]
        self.foreign = [bucket for bucket, role in enumerate(owners) if role is not self.roles[0]]
        for bucket in self.foreign:
            self.perturbed_grads.release(bucket)
        self._step_hook = self.base_optimizer.register_step_post_hook(lambda *_: self._share_weights())

    def close(self) -> None:
        super().close()
        self._step_hook.remove()

    def check_state(self) -> None:
        super().check_state()
        self._drop_foreign_state()

    # ---- Displaced weights ----

    def _perturb(self, ascent: Pass) -> Buckets:
        return self._displace(ascent, mine=self._write_perturbed, theirs=self._write_lookahead)

    def _look_ahead(self, ascent: Pass) -> Buckets:
        return self._displace(ascent, mine=self._write_lookahead, theirs=self._write_perturbed)

    def _displace(self, ascent: Pass, mine: Callable, theirs: Callable) -> Buckets:
        """Write the weights of both roles for the owned half, and exchange them for the other half of one's own."""
        lent = self.perturbed_grads  # nothing is in the owned buckets before the pass
        for bucket in self.owned:
            lent.ensure(bucket)  # a pass that failed leaves large ones released
        with record_function("SAMPa.displace"):
            theirs(ascent, lent)
            mine(ascent, self.ascent_grads)
        self._swap_halves(lent)
        return self.ascent_grads

    def _swap_halves(self, source: Buckets) -> None:
        """Give the owned buckets of `source` for the others, which go where displaced weights are kept."""
        for own, foreign in zip_longest(self.owned, self.foreign):
            self.exchange.transfer(
                None if own is None else source.flats[own],
                None if foreign is None else self.ascent_grads.flats[foreign],
            )
        self.exchange.finish()

    def _help_perturb(self, ascent: Pass) -> None:
        self._look_ahead(ascent)  # writes, and sends, its half of x~_t

    # ---- Gradients ----

    def _start_exchange(self, bucket: int, into: Buckets, weights: Buckets | None, ready: Callable[[], None]) -> None:
        if bucket in self.owned:
            theirs = None if weights is None or not self._lookahead_runs else weights.flats[bucket]
            self.exchange.start(into.flats[bucket], theirs, send=False, ready=ready)
        else:
            self.exchange.start(into.flats[bucket], ready=ready, sent=partial(self._release, into, bucket))

    def _release(self, grads: Buckets, bucket: int) -> None:
        for i in grads.members[bucket]:
            self.params[i].grad = None
        grads.release(bucket)

    def grad_norm(self) -> Tensor:
        """||G_t|| of the model over both halves, from ``.grad``; the bits of `torch.nn.utils.get_total_norm`. A collective."""
        own = torch.zeros(self.of_model, dtype=torch.float64, device=self.params[0].device)
        reached = [i for i in sorted(self.reached) if i < self.of_model]
        owned = set(self._owned_params())
        mine = [i for i in reached if i in owned]
        if mine:
            own[mine] = torch.stack(torch._foreach_norm([self.params[i].grad for i in mine])).double()
        norms = self.exchange.gather(own).amax(dim=0).unbind()
        return torch.nn.utils.get_total_norm([norms[i].to(self.params[i].dtype) for i in reached])

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the owned half of G_t by the norm of the whole, which is returned. A collective."""
        norm = self.grad_norm()
        owned = [self.params[i] for i in self._owned_params() if i < self.of_model]
        torch.nn.utils.clip_grads_with_norm_(owned, max_norm, norm)
        return norm

    def _over_owners(self, squares: Tensor) -> Tensor:
        return self.exchange.gather(squares).sum(dim=0) / self.exchange.mesh.num_replicas

    # ---- The update ----

    @torch.no_grad()
    def _share_weights(self) -> None:
        """Exchange the halves of x_{t+1}, a bucket at a time."""
        free = self.ascent_grads  # in the buckets of the other process
        for own, foreign in zip_longest(self.owned, self.foreign):
            self.exchange.transfer(
                None if own is None else self._packed(own), None if foreign is None else free.flats[foreign]
            )
            self.exchange.finish()
            if foreign is not None:
                torch._foreach_copy_(self._in_bucket(foreign, self.params), self._in_bucket(foreign, free.views))

    def _packed(self, bucket: int) -> Tensor:
        """The weights of a bucket, ``(n,)``; those of a large parameter where they are, without a copy."""
        params, views = self._in_bucket(bucket, self.params), self._in_bucket(bucket, self.ascent_grads.views)
        if len(params) == 1 and params[0].stride() == views[0].stride():
            return params[0].detach().as_strided((params[0].numel(),), (1,))
        packed = torch.empty_like(self.ascent_grads.flats[bucket])
        torch._foreach_copy_(self.ascent_grads.cut(bucket, packed), params)
        return packed

    def _in_bucket(self, bucket: int, per_param: list[Tensor]) -> list[Tensor]:
        return [per_param[i] for i in self.ascent_grads.members[bucket]]

    # ---- Checkpoints: whole, whoever wrote them ----

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As in `SAMPa`, with both halves of g_t. A collective."""
        if self.ascent is not None:
            self._swap_halves(self.ascent_grads)
        return super().state_dict()

    @contextmanager
    def whole_optimizer(self) -> Iterator[None]:
        """Within the block rank 0's base optimizer holds the state of all parameters. A collective."""
        state, mesh = self.base_optimizer.state, self.exchange.mesh
        for bucket, members in enumerate(self.ascent_grads.members):
            # From the other half of rank 0's pair; further pairs hold the same.
            asked = bucket in self.owned and mesh.replica == 0
            found = self.exchange.collect([_on_cpu(state.get(self.params[i])) for i in members] if asked else None)
            if mesh.rank == 0 and bucket in self.foreign:
                values = zip(members, found[mesh.peer], strict=True)
                state.update({self.params[i]: value for i, value in values if value})
        try:
            yield
        finally:
            self._drop_foreign_state()

    def _drop_foreign_state(self) -> None:
        for bucket in self.foreign:
            for i in self.ascent_grads.members[bucket]:
                self.base_optimizer.state.pop(self.params[i], None)


def halves(sizes: list[int]) -> list[Role]:
    """Who owns each bucket, so that both own about as much: largest first, each to who has less."""
    owners, owned = [Role.PERTURBED] * len(sizes), dict.fromkeys(Role, 0)
    for bucket in sorted(range(len(sizes)), key=lambda bucket: -sizes[bucket]):
        owners[bucket] = min(Role, key=lambda role: owned[role])
        owned[owners[bucket]] += sizes[bucket]
    return owners


def check_separable(optimizer: Optimizer) -> None:
    """Raise ValueError where the step of a parameter may depend on other parameters."""
    known = [getattr(torch.optim, name) for name in SEPARABLE]
    if type(optimizer) not in known:
        raise ValueError(
            f"shard_optimizer: expected an optimizer that treats every parameter on its own, one of {', '.join(SEPARABLE)} "
            f"of torch.optim, got {type(optimizer).__module__}.{type(optimizer).__name__}. Use one of them, or leave shard_optimizer out."
        )


SEPARABLE = ("Adafactor", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")


def _on_cpu(state: dict | None) -> dict | None:
    return state and {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
