"""Sequential SAM (Foret et al. 2021), and every recipe in its timing: all gradients at x_t, one after the other.

Symbols: `hf_sampa.functional`.
"""

from __future__ import annotations

import torch
from torch.profiler import record_function

from .buckets import Buckets
from .engine import SharpnessAware
from .gradients import Gradient
from .passes import Batch, Found, Pass, StepReport
from .recipe import Moment
from .roles import Role


class SAM(SharpnessAware):
    """Both gradients on B_t, one after the other. All processes are replicas. Takes what `SharpnessAware` takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # x~_t takes the place of g_t, unless the recipe mixes g_t with g~_t.
        self._x_tilde = Buckets(self.params) if self.recipe.mixing.needs_ascent else self.ascent_grads

    def step(self, batch: Batch, next_batch: Batch, gradient: Gradient) -> StepReport:
        """One step from x_t with B_t; leaves G_t in ``.grad``. B_{t+1} is for recipes that ask for it."""
        recipe, now, found = self.recipe, self._now(batch), {}
        ascends = recipe.when.reads_gradient or recipe.when(now, None)
        ascent = norm = None
        if recipe.needs_gradient or not ascends:
            # g_t = grad f(x_t; B_t)
            found[Role.LOOKAHEAD] = self._ascent_gradient(batch, gradient, ascends, now)
            norm = found[Role.LOOKAHEAD].norm
        if found and recipe.waits:
            ascent = self._share(found)[Role.LOOKAHEAD]
            if not ascent.finite:
                return self._finish(ascent, None, ascent.loss, ascent.used, skipped=True)
            ascends = ascends and (not recipe.when.reads_gradient or recipe.when(now, ascent.norm))
            recipe.mask.observe(self.ascent_grads.views, now)
        if not ascends:
            return self._base_step(ascent, found, now)
        # x~_t = x_t + eps_t; eps_t = rho g_t / ||g_t||, or what the recipe makes of g_t
        with record_function("SAMPa.displace"):
            self._ascend(self.ascent_grads, norm, self._x_tilde, now)
        # g~_t = grad f(x~_t; B_t)
        found[Role.PERTURBED] = self._gradient_at(
            self._x_tilde,
            Role.PERTURBED,
            batch,
            gradient,
            self.perturbed_grads,
            only=recipe.mask.keeps(now) if recipe.mask.descent else None,
            keep_statistics=bool(found),
        )
        return self._descend(found, now)

    def _ascent_gradient(self, batch: Batch, gradient: Gradient, ascends: bool, now: Moment) -> Found:
        recipe = self.recipe
        # Where nothing but the perturbation is made of g_t, backward need not compute what the mask leaves out.
        alone = ascends and not recipe.when.reads_gradient and not recipe.mixing.needs_ascent
        only = recipe.mask.keeps(now) if alone or recipe.mask.descent else None
        return self._gradient(Role.LOOKAHEAD, batch, gradient, self.ascent_grads, only=only)

    def _descend(self, found: dict[Role, Found], now: Moment) -> StepReport:
        shared = self._share(found)
        ascent, perturbed = shared.get(Role.LOOKAHEAD), shared[Role.PERTURBED]
        skipped = not (perturbed.finite and (ascent is None or ascent.finite))
        used = perturbed.used
        if not skipped:
            with record_function("SAMPa.combine"):
                used = self._mix(ascent, perturbed, self.ascent_grads, now)
        return self._finish(ascent, perturbed, (ascent or perturbed).loss, used, skipped)

    def _base_step(self, ascent: Pass | None, found: dict[Role, Found], now: Moment) -> StepReport:
        """G_t is g_t, with what the recipe stored of earlier steps."""
        ascent = ascent or self._share(found)[Role.LOOKAHEAD]
        if ascent.finite:
            self.perturbed_grads.swap(self.ascent_grads, self.owned)
            with torch.no_grad():
                self.recipe.mixing.reuse(self.perturbed_grads.views, now)
        used = self.recipe.mixing.reached(ascent.used, None)
        return self._finish(ascent, None, ascent.loss, used, skipped=not ascent.finite)
