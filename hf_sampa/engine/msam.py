"""mSAM: every shard of B_t has a perturbation of its own (Foret et al. 2021, m-sharpness; Behdin et al. 2023, eq. 2).

G_t is the mean over the shards S_j of grad f(x_t + eps_j; S_j), eps_j = rho g_j / ||g_j||, g_j = grad f(x_t; S_j) or, in
SAMPa's timing, g_j = grad f(y_t; S_j), taken one step earlier; y_{t+1} and the lambda part are made of their mean, g_t.
A shard belongs to one process: replicas average what comes out of their shards, never the g_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed import Role
from ..functional import NORM_GUARD, global_norm
from .buckets import Buckets
from .gradients import Gradient
from .passes import Batch, Found, Pass, StepReport
from .sam import SAM
from .sampa import SAMPa
from .sharpness_aware import SharpnessAware


Shard = tuple[Batch, Any]  # with its weight in the mean over all shards of the update batch


def _weighted(values: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum().double()


class Shards(SharpnessAware):
    """What both timings do with shards. Takes what `SharpnessAware` takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._part = self._buckets()

    def _shards(self, batch: Batch) -> list[Shard]:
        return self.samples.shards(batch, self.recipe.samples.shards)

    def _perturbed_gradient(self, g: Buckets, norm: Tensor, shard: Batch, gradient: Gradient, batch: Batch) -> Found:
        """grad f(x_t + eps_j; S_j), into `_part`; the place of g_j is where the weights are displaced to."""
        self._ascend(g, norm, g, self.now(batch))
        return self._gradient_at(g, Role.PERTURBED, shard, gradient, self._part, keep_statistics=True, local=True)

    @torch.no_grad()
    def _mean(self, batch: Batch, runs: Sequence[tuple[Callable[[], Found], Any, Buckets]], into: Buckets) -> Found:
        """Of gradients, over shards and replicas.

        Args:
            batch: what the shards are of.
            runs: for each shard what computes its gradient, its weight and where the gradient is afterwards.
            into: becomes the mean.
        """
        into.unshare()
        for bucket in range(len(into.flats)):
            into.ensure(bucket)
            into.flats[bucket].zero_()
        found, weights = [], [weight for _, weight, _ in runs]
        for run, weight, part in runs:
            with torch.enable_grad():
                found.append(run())
            torch._foreach_add_(into.flats, torch._foreach_mul(part.flats, weight))
        for flat in into.flats:
            self.exchange.start(flat, send=False)
        self.exchange.finish()
        norm, model_norm = self._norms(into)
        loss = _weighted([each.loss for each in found], weights)
        # The cosine that is reported is the mean of the shards'.
        dot = norm * _weighted([each.dot / (each.norm + NORM_GUARD) for each in found], weights)
        used = [any(of_all) for of_all in zip(*(each.used for each in found), strict=True)]
        return Found(batch.fingerprint, loss, norm, dot, used, model_norm)


class MSAM(Shards, SAM):
    """mSAM in SAM's timing."""

    def step(self, batch: Batch, next_batch: Batch, gradient: Gradient) -> StepReport:
        """One step from x_t with B_t; leaves G_t in ``.grad``."""
        shards, ascents, self.reported = self._shards(batch), [], Role.LOOKAHEAD

        def run(shard: Batch) -> Found:
            # g_j = grad f(x_t; S_j)
            ascents.append(self._gradient(Role.LOOKAHEAD, shard, gradient, self.ascent_grads, local=True))
            # g~_j = grad f(x_t + eps_j; S_j)
            return self._perturbed_gradient(self.ascent_grads, ascents[-1].norm, shard, gradient, batch)

        runs = [(lambda s=shard: run(s), weight, self._part) for shard, weight in shards]
        found = self._mean(batch, runs, self.perturbed_grads)
        weights = [weight for _, weight in shards]
        loss, norm = (_weighted([getattr(each, name) for each in ascents], weights) for name in ("loss", "norm"))
        at_x = Found(batch.fingerprint, loss, norm, torch.zeros_like(loss), found.used, norm)
        shared = self._share({Role.LOOKAHEAD: at_x, Role.PERTURBED: found})
        ascent, perturbed = shared[Role.LOOKAHEAD], shared[Role.PERTURBED]
        return self._finish(ascent, perturbed, ascent.loss, perturbed.used, skipped=not perturbed.finite)


class MSAMPa(Shards, SAMPa):
    """mSAM in SAMPa's timing: the g_j of B_{t+1} are taken at y_{t+1}, and all of them travel. Holds d numbers per shard more."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._g_of: list[Buckets] = []  # the g_j of B_t, on processes that are PERTURBED

    def lookahead_error(self, batch: Batch, gradient: Gradient) -> None:
        """None: the g_j have errors of their own."""

    def _two_gradients(self, ascent: Pass, batch: Batch, next_batch: Batch, gradient: Gradient) -> dict[Role, Found]:
        found, coming = {}, self._shards(next_batch)
        if Role.PERTURBED in self.roles:
            found[Role.PERTURBED] = self._mean_at_perturbed(batch, gradient)
        if Role.LOOKAHEAD in self.roles:
            # y_{t+1} = U_{m_t}(x_t, g_t), and g_j = grad f(y_{t+1}; S_j) for the shards of B_{t+1}
            y, g_next = self._look_ahead(ascent), self._lookahead_grads
            with self.displaced(y):
                found[Role.LOOKAHEAD] = self._ascent_gradients(next_batch, coming, gradient, g_next)
        self._hand_over(len(coming))
        return found

    def _mean_at_perturbed(self, batch: Batch, gradient: Gradient) -> Found:
        """Mean of the g~_j = grad f(x_t + eps_j; S_j)."""

        def run(shard: Batch, g: Buckets) -> Found:
            return self._perturbed_gradient(g, global_norm(g.views), shard, gradient, batch)

        shards = zip(self._shards(batch), self._g_of, strict=True)
        runs = [(partial(run, shard, g), weight, self._part) for (shard, weight), g in shards]
        return self._mean(batch, runs, self.perturbed_grads)

    def _last_gradient(self, ascent: Pass, batch: Batch, gradient: Gradient) -> dict[Role, Found]:
        perturbs = Role.PERTURBED in self.roles
        found = {Role.PERTURBED: self._mean_at_perturbed(batch, gradient)} if perturbs else {}
        for flat in self.perturbed_grads.flats if self.exchange.mesh.paired else []:
            self.exchange.transfer(flat if perturbs else None, None if perturbs else flat)
        self.exchange.finish()
        return found

    def _ascent_gradients(self, batch: Batch, shards: Sequence[Shard], gradient: Gradient, into: Buckets) -> Found:
        """The g_j at the weights as they are, and their mean."""
        self._g_of = [self._buckets() for _ in shards]
        runs = [
            (lambda s=shard, g=g: self._gradient(Role.LOOKAHEAD, s, gradient, g, local=True), weight, g)
            for (shard, weight), g in zip(shards, self._g_of, strict=True)
        ]
        return self._mean(batch, runs, into)

    def _hand_over(self, count: int, perturbed: bool = True) -> None:
        """g_{t+1} takes the place of g_t on all processes, and the `count` g_j come to those who perturb.

        perturbed: whether there is a g~_t, which then comes to all.
        """
        if self.exchange.mesh.paired:
            perturbs = Role.PERTURBED in self.roles
            if perturbs:
                self._g_of = [self._buckets() for _ in range(count)]
            mine = self.perturbed_grads if perturbs else self._lookahead_grads
            sends, receives = perturbed or not perturbs, perturbed or perturbs
            for bucket, theirs in enumerate(self.ascent_grads.flats):
                self.exchange.transfer(mine.flats[bucket] if sends else None, theirs if receives else None)
                for g in self._g_of:
                    self.exchange.transfer(
                        None if perturbs else g.flats[bucket], g.flats[bucket] if perturbs else None
                    )
            self.exchange.finish()
        if Role.LOOKAHEAD in self.roles:
            self.ascent_grads.swap(self._lookahead_grads, self.owned)

    def _start(self, batch: Batch, gradient: Gradient) -> Pass:
        found, shards = {}, self._shards(batch)
        if Role.LOOKAHEAD in self.roles:
            found[Role.LOOKAHEAD] = self._ascent_gradients(batch, shards, gradient, self._lookahead_grads)
        self._hand_over(len(shards), perturbed=False)
        return self._share(found)[Role.LOOKAHEAD]

    # ---- Checkpoints ----

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        grads, ascent = super().state_dict()
        shards = [zip(self.names, g.views, strict=True) for g in (self._g_of if ascent else [])]
        return {**grads, **{f"{name}@{j}": g for j, each in enumerate(shards) for name, g in each}}, ascent

    def load_state_dict(self, grads: dict[str, Tensor], ascent: dict[str, Any]) -> None:
        super().load_state_dict({name: grad for name, grad in grads.items() if "@" not in name}, ascent)
        self._g_of = [self._buckets() for _ in range(len(grads) // len(self.params) - 1)]
        for j, g in enumerate(self._g_of):
            for name, view in zip(self.names, g.views, strict=True):
                view.copy_(grads[f"{name}@{j}"])


class TwoLossSAMPa(MSAMPa):
    """For recipes whose ascent has a loss of its own, in SAMPa's timing, with the own loss's gradient for y and the mix.

    B_{t+1} has two gradients at y_{t+1} then, one after the other: that of the ascent loss travels as a g_j does, that of the
    trainer's loss takes the place of their mean.
    """

    def _shards(self, batch: Batch) -> list[Shard]:
        return [(batch, 1.0)]

    def _ascent_gradients(self, batch: Batch, shards: Sequence[Shard], gradient: Gradient, into: Buckets) -> Found:
        self._g_of = [self._buckets()]
        for role, mean in ((Role.LOOKAHEAD, self._g_of[0]), (Role.PERTURBED, into)):
            run = partial(self._gradient, role, batch, gradient, self._part, local=True)
            found = self._mean(batch, [(run, 1.0, self._part)], mean)
        return found
