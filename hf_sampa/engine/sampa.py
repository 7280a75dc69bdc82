"""SAMPa (Algorithm 2) on any base optimizer, on one process or on pairs of them.

A step starts from the weights x_t and ends with them; what it leaves behind is G_t in ``.grad``, ready for clipping and
the base optimizer's step x_{t+1} = U_{m_t}(x_t, G_t). Symbols: `hf_sampa.functional`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..distributed import Role
from ..functional import NORM_GUARD, interpolate_
from ..variants import Moment
from .buckets import Buckets
from .gradients import Gradient
from .lookahead import LOOK_AHEAD_TRIALS, look_ahead
from .passes import Batch, Found, Pass, StepReport
from .sharpness_aware import SharpnessAware


logger = logging.getLogger(__name__)


class SAMPa(SharpnessAware):
    """SAMPa-lambda (Xie, Pethick, Cevher 2024, Algorithm 2).

    Args:
        lmbda: weight of the look-ahead gradient in G_t, in [0, 1].
        clip_scale: given ||g_t|| over the model's parameters, what the look-ahead multiplies their part of g_t by, as clipping
            would do before a real step.
        kwargs: see `SharpnessAware`.
    """

    def __init__(self, *args, lmbda: float, clip_scale: Callable[[float], float] = lambda norm: 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.lmbda, self.clip_scale = lmbda, clip_scale
        self.recipe.check_parallel()
        self.ascent: Pass | None = None  # what belongs to the g_t in `ascent_grads`; None: there is no g_t
        # One process that plays both roles needs g_t for the look-ahead after it has been at x~_t.
        paired = self.exchange.mesh.paired
        self._x_tilde = self.ascent_grads if paired else self._buckets()
        self._lookahead_grads = self.perturbed_grads if paired else self._x_tilde
        # A recipe that mixes g_t with g~_t needs it after its place was given away.
        self._g = self._buckets() if self.recipe.mixing.needs_ascent else None
        self._moment = Moment()
        self._lookahead_trials = LOOK_AHEAD_TRIALS  # yet to come
        self._lookahead_runs = True  # beside the perturbed pass, so that there is a gradient to receive

    def step(self, batch: Batch, next_batch: Batch | None, gradient: Gradient) -> StepReport:
        """One step from x_t with B_t and B_{t+1}; leaves G_t in ``.grad`` and carries g_{t+1}.

        After the last batch of all there is no B_{t+1}, and G_t is g~_t.
        Raises RuntimeError where g_t and g~_t do not come from one batch.
        """
        self.reported = None
        if self.ascent is None:
            self.starting = True
            self.ascent = self._start(batch, gradient)  # g_0 = grad f(x_0; B_0)
            self.starting = False
            self.share_rest()
        # Until this step is through, there is no g_t to go on with.
        ascent, self.ascent = self.ascent, None
        if not ascent.finite:
            return self._finish(ascent, ascent, ascent.loss, ascent.used, skipped=True)
        self._moment = self.now(batch)
        if next_batch is None:
            return self._last_step(ascent, batch, gradient)
        self.reported = Role.LOOKAHEAD
        shared = self._share(self._two_gradients(ascent, batch, next_batch, gradient))
        perturbed, lookahead = shared[Role.PERTURBED], shared[Role.LOOKAHEAD]
        self._check_pairing(ascent, perturbed)
        skipped = not (perturbed.finite and lookahead.finite)
        # G_t = (1 - lambda) g~_t + lambda g_{t+1}, in the place of g~_t
        used = perturbed.used if skipped else self._combine(ascent, perturbed, lookahead)
        if lookahead.finite:
            self.ascent = lookahead
        return self._finish(ascent, perturbed, lookahead.loss, used, skipped)

    def _two_gradients(self, ascent: Pass, batch: Batch, next_batch: Batch, gradient: Gradient) -> dict[Role, Found]:
        """g~_t and g_{t+1}, by the processes whose role it is; g_{t+1} takes the place of g_t on all."""
        found = {}
        self._keep_ascent()
        if Role.PERTURBED in self.roles:
            found[Role.PERTURBED] = self._gradient_at_perturbed(ascent, batch, gradient)
        if Role.LOOKAHEAD in self.roles:
            # y_{t+1} = U_{m_t}(x_t, g_t), m_t kept as it was
            y, g_next = self._look_ahead(ascent), self._lookahead_grads
            # g_{t+1} = grad f(y_{t+1}; B_{t+1})
            found[Role.LOOKAHEAD] = self._gradient_at(y, Role.LOOKAHEAD, next_batch, gradient, g_next)
            self.ascent_grads.swap(g_next, self.owned)
        return found

    def _keep_ascent(self) -> None:
        """A copy of g_t, for recipes that need it after its place was given away."""
        if self._g:
            torch._foreach_copy_(self._g.flats, self.ascent_grads.flats)

    def _gradient_at_perturbed(self, ascent: Pass, batch: Batch, gradient: Gradient) -> Found:
        self._learn(self._moment)
        # x~_t = x_t + eps_t; eps_t = rho g_t / ||g_t||, or what the recipe makes of g_t
        x_tilde, g_tilde = self._perturb(ascent), self.perturbed_grads
        # g~_t = grad f(x~_t; B_t)
        return self._gradient_at(x_tilde, Role.PERTURBED, batch, gradient, g_tilde, keep_statistics=True)

    def _last_step(self, ascent: Pass, batch: Batch, gradient: Gradient) -> StepReport:
        """The step of the last update batch of all: G_t = g~_t, since there is no B_{t+1} for g_{t+1}."""
        logger.info(
            "The data are over: there is no batch after this step's, so that it goes without a look-ahead gradient."
        )
        self._keep_ascent()
        self._lookahead_runs = False
        try:
            found = self._last_gradient(ascent, batch, gradient)
        finally:
            self._lookahead_runs = True
        perturbed = self._share(found)[Role.PERTURBED]
        self._check_pairing(ascent, perturbed)
        skipped, used = not perturbed.finite, perturbed.used
        if not skipped:
            used = self._mix(ascent, perturbed, self._g, self._moment)
        return self._finish(ascent, perturbed, ascent.loss, used, skipped)

    def _last_gradient(self, ascent: Pass, batch: Batch, gradient: Gradient) -> dict[Role, Found]:
        """g~_t, by the PERTURBED role, which sends it to the other; x~_t is left where g_t was."""
        if Role.PERTURBED in self.roles:
            return {Role.PERTURBED: self._gradient_at_perturbed(ascent, batch, gradient)}
        self._help_perturb(ascent)
        for bucket in self.owned:
            self.perturbed_grads.ensure(bucket)
            self.exchange.transfer(None, self.perturbed_grads.flats[bucket])
        self.exchange.finish()
        return {}

    def _help_perturb(self, ascent: Pass) -> None:
        """What the LOOKAHEAD role has to do so that the other can displace its weights."""

    def _start_exchange(self, bucket: int, into: Buckets, weights: Buckets | None, ready: Callable[[], None]) -> None:
        super()._start_exchange(bucket, into, weights if self._lookahead_runs else None, ready)

    def settings(self) -> dict[str, float]:
        return {**super().settings(), "lmbda": self.lmbda}

    def _combine(self, ascent: Pass, perturbed: Pass, lookahead: Pass) -> list[bool]:
        """Mix the gradients of the owned parameters; returns, for all parameters, whether G_t has a part of them."""
        with record_function("SAMPa.combine"):
            reached = self._mix(ascent, perturbed, self._g, self._moment)
            g_tilde, g_next = self.perturbed_grads.flats, self.ascent_grads.flats
            interpolate_([g_tilde[b] for b in self.owned], [g_next[b] for b in self.owned], self.lmbda)
        return [(p and self.lmbda < 1) or (n and self.lmbda > 0) for p, n in zip(reached, lookahead.used, strict=True)]

    @property
    def reads_next_batch(self) -> bool:
        """Whether this process takes a gradient on B_{t+1}."""
        return Role.LOOKAHEAD in self.roles

    def forget(self) -> None:
        """Drop g_t: the next step computes it at x_t, as the first one does."""
        self.ascent = None

    def lookahead_error(self, batch: Batch, gradient: Gradient) -> tuple[float, float] | None:
        """How far g_t = grad f(y_t; B_t) is from grad f(x_t; B_t) (Figure 4), between two steps; `batch` is B_t.

        Returns:
            The cosine between them and their Euclidean distance; None where there is no g_t. Leaves nothing behind.
        """
        if self.ascent is None:
            return None
        at_x, self.reported = self._buckets(), None
        with self.forward_state.kept():
            self._gradient(Role.LOOKAHEAD, batch, gradient, at_x, local=True)
        for flat in at_x.flats:
            self.exchange.start(flat, send=False)
        self.exchange.finish()
        for param in self.params:
            param.grad = None
        squares = torch.zeros(3, dtype=torch.float64, device=self.params[0].device)
        for g, exact in zip(*self._owned_of(self.ascent_grads.views, at_x.views), strict=True):
            squares += torch.stack([each.double().square().sum() for each in (g, exact, g - exact)])
        of_g, of_exact, of_difference = self._over_owners(squares).tolist()
        # By the law of cosines, which near 1 is exact where a product of the two is not.
        cosine = (of_g + of_exact - of_difference) / (2 * (of_g * of_exact) ** 0.5 + NORM_GUARD)
        return cosine, of_difference**0.5

    def _over_owners(self, squares: Tensor) -> Tensor:
        """Sum of what the owners of the parameters found, ``(n,)``."""
        return squares

    def _start(self, batch: Batch, gradient: Gradient) -> Pass:
        """g_t = grad f(x_t; B_t), by the LOOKAHEAD role, so that all ranks hold the same bits of it."""
        found = {}
        if Role.LOOKAHEAD in self.roles:
            found[Role.LOOKAHEAD] = self._gradient(Role.LOOKAHEAD, batch, gradient, self._lookahead_grads)
            self.ascent_grads.swap(self._lookahead_grads, self.owned)
        else:
            for bucket in self.owned:
                self.exchange.transfer(None, self.ascent_grads.flats[bucket])
            self.exchange.finish()
        return self._share(found)[Role.LOOKAHEAD]

    def _perturb(self, ascent: Pass) -> Buckets:
        """x~_t, in the place of g_t or, where that is still needed, in memory of its own."""
        self.recipe.mask.observe(self.ascent_grads.views, self._moment)
        with record_function("SAMPa.displace"):
            self._write_perturbed(ascent, self._x_tilde)
        return self._x_tilde

    def _look_ahead(self, ascent: Pass) -> Buckets:
        """y_{t+1}, in the place of g_t."""
        with record_function("SAMPa.displace"):
            self._write_lookahead(ascent, self.ascent_grads)
        return self.ascent_grads

    def _write_perturbed(self, ascent: Pass, out: Buckets) -> None:
        """Write x~_t of the owned parameters into `out`."""
        self._ascend(self.ascent_grads, ascent.norm, out, self._moment)

    def _write_lookahead(self, ascent: Pass, out: Buckets) -> None:
        """Write y_{t+1} of the owned parameters into `out`."""
        params, grads, moved, used = self._owned_of(self.params, self.ascent_grads.views, out.views, ascent.used)
        grads = [grad if reached else None for grad, reached in zip(grads, used, strict=True)]
        scale = self.clip_scale(ascent.clipped_norm)
        if len(self.params) > self.of_model:  # weights that are not the model's are not clipped
            clipped = [i < self.of_model for i in self._owned_params()]
            grads = [g if g is None or not own else g * scale for g, own in zip(grads, clipped, strict=True)]
            scale = 1.0
        self._lookahead_trials -= look_ahead(
            self.base_optimizer,
            params,
            grads,
            out=moved,
            scale=scale,
            on_trial=self._lookahead_trials > 0,
        )

    def _check_pairing(self, ascent: Pass, perturbed: Pass) -> None:
        if ascent.fingerprints != perturbed.fingerprints:
            raise RuntimeError(
                "Expected g_t and g~_t to come from the same batch B_t, but the LOOKAHEAD processes read batches with "
                f"fingerprints {list(ascent.fingerprints)} and the PERTURBED ones {list(perturbed.fingerprints)}. "
                "The processes see different data: give all of them the same dataset in the same order, and draw any "
                "randomness of dataset and collator from torch, numpy or random (they are seeded per item), not from "
                "generators of your own or a sampler that knows its rank. Data that are split by rank, as by "
                "split_dataset_by_node, are to be split by args.mesh.replica of args.mesh.num_replicas."
            )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an exact continuation needs besides weights and optimizer: g_t by parameter name, and plain values."""
        if self.ascent is None:
            return {}, {}
        grads = dict(zip(self.names, self.ascent_grads.views, strict=True))
        return grads, {name: getattr(self.ascent, name) for name in Pass.__dataclass_fields__}

    def load_state_dict(self, grads: dict[str, Tensor], ascent: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError where `grads` belong to another model."""
        if not ascent:
            self.forget()
            return
        expected = {name: tuple(param.shape) for name, param in zip(self.names, self.params, strict=True)}
        found = {name: tuple(grad.shape) for name, grad in grads.items()}
        if found != expected:
            differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            name = differing[0]
            raise ValueError(
                f"The checkpoint's carried gradient belongs to another model: {len(differing)} parameter(s) differ, "
                f"the first being {name!r}: expected shape {expected.get(name)}, got {found.get(name)}. Resume with "
                "the model, and the frozen layers, that the checkpoint was written with."
            )
        for name, view in zip(self.names, self.ascent_grads.views, strict=True):
            view.copy_(grads[name])
        tuples = {name: tuple(value) for name, value in ascent.items() if isinstance(value, list | tuple)}
        self.ascent = Pass(**{**ascent, **tuples})
