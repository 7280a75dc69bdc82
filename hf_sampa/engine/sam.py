"""Sequential SAM (Foret et al. 2021), and every recipe in its timing: all gradients at x_t, one after the other.

Symbols: `hf_sampa.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..distributed import Role
from ..functional import real
from ..variants import Moment
from .ascents import ShardAscents
from .buckets import Buckets
from .gradients import Backward
from .passes import Batch, Found, Pass, StepReport
from .sharpness_aware import SharpnessAware


class SAM(SharpnessAware):
    """Both gradients on B_t, one after the other. All processes are replicas. Takes what `SharpnessAware` takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # x~_t takes the place of g_t, unless the recipe mixes g_t with g~_t.
        self._x_tilde = self.buckets() if self.recipe.mixing.needs_ascent else self.ascent_grads
        self._shards = ShardAscents(self) if self.recipe.samples.sharded else None
        self._teacher: Buckets | None = None  # running mean of the weights, for losses that ask for it

    def close(self) -> None:
        super().close()
        self._shards = None  # which knows of this engine: buffers are freed at once

    @property
    def reads_next_batch(self) -> bool:
        """Whether g_t is taken on B_{t+1}."""
        return self.recipe.samples.next_batch

    def step(self, batch: Batch, next_batch: Batch | None, backward: Backward) -> StepReport:
        """One step from x_t with B_t; leaves G_t in ``.grad``. B_{t+1} is for recipes that ask for it; None after the last."""
        if self._shards:
            return self._step_in_shards(self._shards, batch, backward)
        self.forget_last()
        recipe, now, found = self.recipe, self.now(batch), {}
        ascends = recipe.when.reads_gradient or recipe.when(now, None)
        ascent = norm = before = None
        recipe.adapters.begin(self.rho)
        self.learn(now)
        self._teach(batch)
        self.reported = None
        batch = self._chosen(batch, now)
        self.reported = Role.LOOKAHEAD if recipe.needs_gradient or not ascends else Role.PERTURBED
        if self.reported is Role.LOOKAHEAD:
            # g_t = grad f(x_t; B_t)
            source = next_batch if recipe.samples.next_batch and next_batch is not None else batch
            found[Role.LOOKAHEAD] = self._ascent_gradient(source, backward, ascends, now)
            norm = found[Role.LOOKAHEAD].norm
            before = self._seen(batch, now)
        if found and recipe.waits:
            ascent = self._share(found)[Role.LOOKAHEAD]
            if not ascent.finite:
                return self._finish(ascent, None, ascent, ascent.used, skipped=True)
            ascends = not recipe.when.reads_gradient or recipe.when(now, ascent.norm)
            recipe.mask.observe(real(self.ascent_grads.views), now)
        if not ascends:
            return self._base_step(ascent, found, now)
        # x~_t = x_t + eps_t; eps_t = rho g_t / ||g_t||, or what the recipe makes of g_t
        with record_function("SAMPa.displace"):
            self.ascend(self.ascent_grads, norm, self._x_tilde, now)
        # g~_t = grad f(x~_t; B_t)
        found[Role.PERTURBED] = self._perturbed_gradient(batch, backward, before, now, keep_statistics=bool(found))
        return self._descend(found, now)

    def _plain_gradient(self, batch: Batch, backward: Backward) -> Pass:
        found = self.gradient(Role.LOOKAHEAD, batch, backward, self.perturbed_grads)
        return self._share({Role.LOOKAHEAD: found})[Role.LOOKAHEAD]

    def _step_in_shards(self, shards: ShardAscents, batch: Batch, backward: Backward) -> StepReport:
        """mSAM: a perturbation for every shard of B_t."""
        self.reported = Role.LOOKAHEAD
        at_x, found = shards.in_turn(batch, backward)
        shared = self._share({Role.LOOKAHEAD: at_x, Role.PERTURBED: found})
        ascent, perturbed = shared[Role.LOOKAHEAD], shared[Role.PERTURBED]
        return self._finish(ascent, perturbed, ascent, perturbed.used, skipped=not perturbed.finite)

    def _ascent_gradient(self, batch: Batch, backward: Backward, ascends: bool, now: Moment) -> Found:
        recipe = self.recipe
        # Where nothing but the perturbation is made of g_t, backward need not compute what the mask leaves out.
        alone = ascends and not recipe.when.reads_gradient and not recipe.mixing.needs_ascent
        only = self._keeps(now) if alone or recipe.mask.descent else None
        return self.gradient(Role.LOOKAHEAD, batch, backward, self.ascent_grads, only=only)

    def _perturbed_gradient(
        self, batch: Batch, backward: Backward, before: Tensor | None, now: Moment, keep_statistics: bool
    ) -> Found:
        recipe = self.recipe
        if recipe.samples.looks_again:
            with self.displaced(self._x_tilde, keep_statistics=True):
                self.samples.look(batch)
            batch = self.samples.narrowed(batch, recipe.samples.narrow(before, self.samples.losses(batch), now))
        found = self.gradient_at(
            self._x_tilde,
            Role.PERTURBED,
            batch,
            backward,
            self.perturbed_grads,
            only=self._keeps(now) if recipe.mask.descent else None,
            keep_statistics=keep_statistics,
        )
        if recipe.samples.reads_losses and not recipe.samples.looks_again:
            indices = self.samples.indices(batch) if recipe.samples.reads_indices else None
            recipe.samples.observe(indices, before, self.samples.losses(batch), now)
        return found

    def _descend(self, found: dict[Role, Found], now: Moment) -> StepReport:
        shared = self._share(found)
        ascent, perturbed = shared.get(Role.LOOKAHEAD), shared[Role.PERTURBED]
        skipped = not (perturbed.finite and (ascent is None or ascent.finite))
        used = perturbed.used
        if not skipped:
            used = self._mix(ascent, perturbed, self.ascent_grads, now)
        return self._finish(ascent, perturbed, ascent or perturbed, used, skipped)

    def _base_step(self, ascent: Pass | None, found: dict[Role, Found], now: Moment) -> StepReport:
        """G_t is g_t, with what the recipe stored of earlier steps."""
        ascent = ascent or self._share(found)[Role.LOOKAHEAD]
        if ascent.finite:
            self.perturbed_grads.swap(self.ascent_grads, self.placement.landed)
            with torch.no_grad():
                self.recipe.mixing.reuse(real(self.perturbed_grads.views), now)
        used = self.recipe.mixing.reached(ascent.used, None)
        return self._finish(ascent, None, ascent, used, skipped=not ascent.finite)

    # ---- Single samples ----

    def _chosen(self, batch: Batch, now: Moment) -> Batch:
        """The part of B_t that both gradients see."""
        samples, losses = self.recipe.samples, None
        if not (samples.looks_first or samples.reads_indices):
            return batch
        if samples.looks_first:
            with self.forward_state.kept():
                self.samples.look(batch)
            losses = self.samples.losses(batch)
        indices = self.samples.indices(batch) if samples.reads_indices else None
        chosen = samples.choose(losses, indices, now)
        return batch if chosen is None else self.samples.narrowed(batch, chosen)

    def _seen(self, batch: Batch, now: Moment) -> Tensor | None:
        """Per-sample losses of the pass for g_t, if the recipe wants them; its loss may remember what the model said."""
        if self.recipe.loss.reads_indices:
            self.recipe.loss.record(self.samples.indices(batch), self.samples.logits(batch), now)
        return self.samples.losses(batch) if self.recipe.samples.reads_losses else None

    @torch.no_grad()
    def _teach(self, batch: Batch) -> None:
        """Move the teacher towards x_t, and let it say what it makes of the batch."""
        decay = self.recipe.loss.teacher_decay
        if decay is None:
            return
        if self._teacher is None:
            self._teacher = self.buckets()
            torch._foreach_copy_(self._teacher.views, self.weights.here())
        torch._foreach_lerp_(self._teacher.views, self.weights.here(), 1 - decay)
        with self.displaced(self._teacher, keep_statistics=True):
            self.samples.look(batch, evaluating=True)
        for micro_batch in batch:
            micro_batch.teacher = micro_batch.logits

    def recipe_state(self) -> dict[str, Any]:
        teacher = (
            {"teacher": [each.clone() for each in self.weights.whole(self._teacher.views)]} if self._teacher else {}
        )
        return {**super().recipe_state(), **teacher}

    def load_recipe_state(self, state: dict[str, Any]) -> None:
        super().load_recipe_state({part: own for part, own in state.items() if part != "teacher"})
        if "teacher" in state:
            self._teacher = self.buckets()
            for view, own in zip(self._teacher.views, self.weights.parts(state["teacher"]), strict=True):
                view.copy_(own)
