"""SAMPa (Algorithm 2) on any base optimizer, on one process or on pairs of them.

A step starts from the weights x_t and ends with them; what it leaves behind is G_t in ``.grad``, ready for clipping and
the base optimizer's step x_{t+1} = U_{m_t}(x_t, G_t). Symbols: `hf_sampa.functional`. In a pair each process has one role, and
both take their gradient at the same time; one process takes both in turn. What two buffers hold meanwhile, in a pair:

===============================  ====================  ====================
moment                           ``ascent_grads``      ``perturbed_grads``
===============================  ====================  ====================
the step begins                  g_t                   (nothing)
PERTURBED, during its pass       x~_t                  g~_t, as it comes
LOOKAHEAD, during its pass       y_{t+1}               g_{t+1}, as it comes
after the exchange, and a swap   g_{t+1}               g~_t, then G_t
===============================  ====================  ====================
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from ..distributed import Role
from ..functional import interpolate_, ratio, real
from ..variants import Moment
from .ascents import Ascents, ascents_of
from .buckets import Buckets
from .gradients import Backward
from .lookahead import LOOK_AHEAD_TRIALS, look_ahead
from .passes import Batch, Found, Pass, StepReport
from .sharpness_aware import SharpnessAware


logger = logging.getLogger(__name__)


class AtOnce(Protocol):
    """Takes both gradients of a step in another way than one after the other; see `hf_sampa.one_pass`."""

    on: bool

    def two_gradients(self, ascent: Pass, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        """As `SAMPa._two_gradients`, once what comes before the passes is done."""
        ...

    def close(self) -> None:
        """Leave model and engine as they were."""
        ...


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
        self.x_tilde = self.ascent_grads if paired else self.buckets()
        self.lookahead_grads = self.perturbed_grads if paired else self.x_tilde
        # A recipe that mixes g_t with g~_t needs it after its place was given away.
        self._g = self.buckets() if self.recipe.mixing.needs_ascent else None
        if self._g:
            self.placement.keep_landed(self._g)
        self.ascents: Ascents = ascents_of(self.recipe)(self)
        self.moment = Moment()
        self._lookahead_trials = LOOK_AHEAD_TRIALS  # yet to come
        self.one_pass: AtOnce | None = None

    def step(self, batch: Batch, next_batch: Batch | None, backward: Backward) -> StepReport:
        """One step from x_t with B_t and B_{t+1}; leaves G_t in ``.grad`` and carries g_{t+1}.

        After the last batch of all there is no B_{t+1}, and G_t is g~_t.
        Raises RuntimeError where g_t and g~_t do not come from one batch.
        """
        self.reported = None
        self.forget_last()
        if self.ascent is None:
            self.starting = True
            self.ascent = self._start(batch, backward)  # g_0 = grad f(x_0; B_0)
            self.starting = False
            self.share_rest()
        # Until this step is through, there is no g_t to go on with.
        ascent, self.ascent = self.ascent, None
        if not ascent.finite:
            return self._finish(ascent, ascent, ascent, ascent.used, skipped=True)
        self.moment = self.now(batch)
        self.ascents.begin(batch)
        if next_batch is None:
            return self._last_step(ascent, batch, backward)
        self.reported = Role.LOOKAHEAD
        shared = self._share(self._two_gradients(ascent, batch, next_batch, backward), self.placement.dot_left())
        perturbed, lookahead = shared[Role.PERTURBED], shared[Role.LOOKAHEAD]
        self._check_pairing(ascent, perturbed)
        skipped = not (perturbed.finite and lookahead.finite)
        # G_t = (1 - lambda) g~_t + lambda g_{t+1}, in the place of g~_t
        used = perturbed.used if skipped else self._combine(ascent, perturbed, lookahead)
        if lookahead.finite:
            self.ascent = lookahead
        return self._finish(ascent, perturbed, lookahead, used, skipped)

    def _two_gradients(self, ascent: Pass, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        """What this process found of g~_t and g_{t+1}, in the roles that it plays; g_{t+1} takes the place of g_t on all."""
        found = {}
        self.ascents.expect(next_batch)
        self._prepare(ascent)
        if self.one_pass and self.one_pass.on:
            found = self.one_pass.two_gradients(ascent, batch, next_batch, backward)
            self.ascents.hand_over()
            return found
        if Role.PERTURBED in self.roles:
            # x~_t = x_t + eps_t, g~_t = grad f(x~_t; B_t)
            found[Role.PERTURBED] = self.ascents.perturbed(ascent, batch, backward)
        if Role.LOOKAHEAD in self.roles:
            # y_{t+1} = U_{m_t}(x_t, g_t), m_t kept as it was, in the place of g_t
            self.placement.look_ahead(partial(self.write_lookahead, ascent))
            y, g_next = self.ascent_grads, self.lookahead_grads
            # g_{t+1} = grad f(y_{t+1}; B_{t+1})
            found[Role.LOOKAHEAD] = self.ascents.taken(next_batch, backward, g_next, y)
            # The other process sent g~_t to where y_{t+1} was. As the table says, g_{t+1} and g~_t change places.
            self.ascent_grads.swap(g_next, self.placement.landed)
        self.ascents.hand_over()
        return found

    def _prepare(self, ascent: Pass) -> None:
        """Before the passes: g_t is kept for recipes that need it later, and is where it is needed whole."""
        if self._g:
            for bucket in self.placement.landed:
                self._g.flats[bucket].copy_(self.ascent_grads.flats[bucket])
        with record_function("SAMPa.displace"):
            write_perturbed = partial(self._write_perturbed, ascent) if self.recipe.scales else None
            self.placement.spread(partial(self.write_lookahead, ascent), write_perturbed, self.ascents.of_g)

    def _last_step(self, ascent: Pass, batch: Batch, backward: Backward) -> StepReport:
        """The step of the last update batch of all: G_t = g~_t, since there is no B_{t+1} for g_{t+1}."""
        logger.info(
            "The data are over: there is no batch after this step's, so that it goes without a look-ahead gradient."
        )
        self._prepare(ascent)
        found, self.receives = {}, False
        try:
            if Role.PERTURBED in self.roles:
                found[Role.PERTURBED] = self.ascents.perturbed(ascent, batch, backward)
            else:
                self.placement.receive(self.perturbed_grads)
        finally:
            self.receives = True
        perturbed = self._share(found, self.placement.dot_left())[Role.PERTURBED]
        self._check_pairing(ascent, perturbed)
        skipped, used = not perturbed.finite, perturbed.used
        if not skipped:
            used = self._mix(ascent, perturbed, self._g, self.moment)
        return self._finish(ascent, perturbed, ascent, used, skipped)

    def _plain_gradient(self, batch: Batch, backward: Backward) -> Pass:
        """grad f(x_t; B_t), of which each half of a pair takes a part, on its half of B_t; one process takes both in turn."""
        first, second = self.samples.halves(batch)
        paired, found = self.exchange.mesh.paired, {}
        for bucket in self.placement.landed if paired else ():
            self.ascent_grads.ensure(bucket)
        run = partial(self.gradient, backward=backward, theirs=self.ascent_grads if paired else None)
        if Role.PERTURBED in self.roles:
            with self.forward_state.kept():  # running statistics are those of the first half, as of the first process
                found[Role.PERTURBED] = run(Role.PERTURBED, second, into=self.perturbed_grads)
        if Role.LOOKAHEAD in self.roles:
            found[Role.LOOKAHEAD] = run(Role.LOOKAHEAD, first, into=self.lookahead_grads)
            self.ascent_grads.swap(self.lookahead_grads, self.placement.landed)
        shared = self._share({role: replace(each, fingerprint=batch.fingerprint) for role, each in found.items()})
        one, other = shared[Role.LOOKAHEAD], shared[Role.PERTURBED]
        self._check_pairing(one, other)
        if one.finite and other.finite:
            sums, parts = (
                [each.flats[b] for b in self.placement.landed] for each in (self.perturbed_grads, self.ascent_grads)
            )
            torch._foreach_add_(sums, parts)
        used = tuple(a or b for a, b in zip(one.used, other.used, strict=True))
        # Its norm is found when it is clipped; what is known of it here is whether it is finite.
        return replace(one, loss=one.loss + other.loss, norm=one.norm + other.norm, used=used, model_norm=None)

    def settings(self) -> dict[str, float]:
        return {**super().settings(), "lmbda": self.lmbda}

    def _combine(self, ascent: Pass, perturbed: Pass, lookahead: Pass) -> list[bool]:
        """Mix the gradients that landed here; returns, for all parameters, whether G_t has a part of them."""
        with record_function("SAMPa.combine"):
            reached = self._mix(ascent, perturbed, self._g, self.moment)
            g_tilde, g_next, landed = self.perturbed_grads.flats, self.ascent_grads.flats, self.placement.landed
            interpolate_([g_tilde[b] for b in landed], [g_next[b] for b in landed], self.lmbda)
        return [(p and self.lmbda < 1) or (n and self.lmbda > 0) for p, n in zip(reached, lookahead.used, strict=True)]

    @property
    def reads_next_batch(self) -> bool:
        """Whether this process takes a gradient on B_{t+1}."""
        return Role.LOOKAHEAD in self.roles

    def close(self) -> None:
        super().close()
        if self.one_pass:
            self.one_pass.close()
        # They know of this engine: buffers are freed at once.
        self.ascents = self.one_pass = None
        self.moment = Moment()

    def forget(self) -> None:
        """Drop g_t: the next step computes it at x_t, as the first one does."""
        self.ascent = None

    def lookahead_error(self, batch: Batch, backward: Backward) -> tuple[float, float] | None:
        """How far g_t = grad f(y_t; B_t) is from grad f(x_t; B_t) (Figure 4), between two steps; `batch` is B_t.

        Returns:
            The cosine between them and their Euclidean distance; None where there is no g_t, or perturbations are made of others.
            Leaves nothing behind.
        """
        if self.ascent is None or not self.ascents.of_g:
            return None
        self.placement.gather_weights()
        at_x, self.reported = self.buckets(), None
        with self.forward_state.kept():
            self.gradient(Role.LOOKAHEAD, batch, backward, at_x, local=True)
        for flat in at_x.flats:
            self.placement.average(flat)
        self.exchange.finish()
        for param in self.params:
            param.grad = None
        pairs = [real([self.ascent_grads.views[i], at_x.views[i]]) for i in self.placement.updated]
        squares = [torch.stack([each.double().square().sum() for each in (g, exact, g - exact)]) for g, exact in pairs]
        of_g, of_exact, of_difference = sum(self.placement.of_all(squares, shape=(3,))).tolist()
        # By the law of cosines, which near 1 is exact where a product of the two is not.
        cosine = ratio(of_g + of_exact - of_difference, 2 * (of_g * of_exact) ** 0.5)
        return cosine, of_difference**0.5

    def _start(self, batch: Batch, backward: Backward) -> Pass:
        """g_t = grad f(x_t; B_t), by the LOOKAHEAD role, so that all ranks hold the same bits of it."""
        found = {}
        self.placement.gather_weights()
        self.ascents.expect(batch)
        if Role.LOOKAHEAD in self.roles:
            found[Role.LOOKAHEAD] = self.ascents.taken(batch, backward, self.lookahead_grads)
            self.ascent_grads.swap(self.lookahead_grads, self.placement.landed)
        else:
            self.placement.receive(self.ascent_grads)
        self.ascents.hand_over()
        return self._share(found)[Role.LOOKAHEAD]

    def perturb(self, ascent: Pass) -> Buckets:
        """x~_t of g_t, in its place or, where that is still needed, in memory of its own."""
        self.recipe.mask.observe(real(self.ascent_grads.views), self.moment)
        with record_function("SAMPa.displace"):
            self.placement.perturb(partial(self._write_perturbed, ascent), self.x_tilde)
        return self.x_tilde

    def _write_perturbed(self, ascent: Pass, out: Buckets, own: Sequence[int] | None = None) -> None:
        """Write x~_t into `out`, which may be where g_t is; of all parameters or of the `own`."""
        self.ascend(self.ascent_grads, ascent.norm, out, self.moment, own)

    def write_lookahead(self, ascent: Pass, out: Buckets) -> None:
        """Write y_{t+1} of the parameters that this process updates into `out`, which may be where g_t is."""
        own = self.placement.updated
        grads = [self.ascent_grads.views[i] if ascent.used[i] else None for i in own]
        scale = self.clip_scale(ascent.clipped_norm)
        if len(self.params) > self.of_model:  # weights that are not the model's are not clipped
            grads = [g if g is None or i >= self.of_model else g * scale for g, i in zip(grads, own, strict=True)]
            scale = 1.0
        tried = look_ahead(
            self.base_optimizer,
            [self.params[i] for i in own],
            grads,
            out=[out.views[i] for i in own],
            scale=scale,
            on_trial=self._lookahead_trials > 0,
            apart=[self.ascent_grads.bucket_of[i] for i in own],
        )
        self._lookahead_trials -= int(tried)

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
        """What an exact continuation needs besides weights and optimizer: g_t by parameter name, and plain values. A collective."""
        if self.ascent is None:
            return {}, {}
        grads = dict(zip(self.names, self.weights.whole(self.placement.whole_grads(self.ascent_grads)), strict=True))
        return {**grads, **self.ascents.state_dict()}, {
            name: getattr(self.ascent, name) for name in Pass.__dataclass_fields__
        }

    def load_state_dict(self, grads: dict[str, Tensor], ascent: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError where `grads` belong to another model."""
        if not ascent:
            self.forget()
            return
        carried = {name: each for name, each in grads.items() if "@" in name}
        grads = {name: each for name, each in grads.items() if name not in carried}
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
        if not self.ascents.load_state_dict(carried):
            logger.warning(
                "The checkpoint has what the next perturbations are made of for one replica alone, as earlier versions wrote it: g_t is computed "
                "anew. What goes on from there is close to a run that was never stopped, but not equal to it."
            )
            self.forget()
            return
        own = self.weights.parts([grads[name] for name in self.names])
        for view, each in zip(self.ascent_grads.views, own, strict=True):
            view.copy_(each)
        tuples = {name: tuple(value) for name, value in ascent.items() if isinstance(value, list | tuple)}
        self.ascent = Pass(**{**ascent, **tuples})
