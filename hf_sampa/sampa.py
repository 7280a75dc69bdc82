"""The algorithms: SAMPa (Algorithm 2) and sequential SAM, on any base optimizer, on one process or on several.

A step starts from the weights x_t and ends with them; what it leaves behind is G_t in ``.grad``, ready for clipping and
the base optimizer's step x_{t+1} = U_{m_t}(x_t, G_t). Symbols: `hf_sampa.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .engine import Batch, Pass, SharpnessAware, StepReport
from .functional import global_norm, interpolate_, perturb_
from .lookahead import look_ahead_
from .roles import Role


class SAM(SharpnessAware):
    """Sequential SAM (Foret et al. 2021): both gradients on B_t, one after the other. All processes are replicas."""

    def step(self, batch: Batch, gradient: Callable[[Any], Tensor]) -> StepReport:
        """One step; leaves G_t = g~_t in ``.grad``."""
        loss, dot = self._gradient(batch, gradient, Role.LOOKAHEAD)  # g_t = grad f(x_t; B_t)
        ascent = (batch, loss, dot, self._recorder.used)
        norm = global_norm(self.ascent_grads.flats).item()
        with self.displaced(Role.PERTURBED):
            perturb_(self.params, self.ascent_grads.views, self.rho, norm)  # x~_t = x_t + rho g_t / ||g_t||
            loss, dot = self._gradient(batch, gradient, Role.PERTURBED)  # g~_t = grad f(x~_t; B_t)
        found = self._share({Role.LOOKAHEAD: ascent, Role.PERTURBED: (batch, loss, dot, self._recorder.used)})
        ascent, perturbed = found[Role.LOOKAHEAD], found[Role.PERTURBED]
        skipped = not (ascent.finite and perturbed.finite)
        return self._finish(ascent, perturbed, ascent.loss, perturbed.used, skipped)


class SAMPa(SharpnessAware):
    """SAMPa-lambda (Xie, Pethick, Cevher 2024, Algorithm 2).

    Args:
        lmbda: weight of the look-ahead gradient in G_t, in [0, 1].
        kwargs: see `SharpnessAware`.
    """

    def __init__(self, *args, lmbda: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.lmbda = lmbda
        self.ascent: Pass | None = None  # what belongs to the g_t in `ascent_grads`; None: there is no g_t

    def step(self, batch: Batch, next_batch: Batch, gradient: Callable[[Any], Tensor]) -> StepReport:
        """One step from x_t with B_t and B_{t+1}; leaves G_t in ``.grad`` and carries g_{t+1}.

        Raises RuntimeError where g_t and g~_t do not come from one batch.
        """
        if self.ascent is None:
            self.ascent = self._start(batch, gradient)  # g_0 = grad f(x_0; B_0)
        # Until this step is through, there is no g_t to go on with.
        ascent, self.ascent = self.ascent, None
        if not ascent.finite:
            return self._finish(ascent, ascent, ascent.loss, ascent.used, skipped=True)
        passes = {}
        if Role.PERTURBED in self.roles:
            with self.displaced(Role.PERTURBED):
                perturb_(self.params, self.ascent_grads.views, self.rho, ascent.norm)  # x~_t = x_t + rho g_t/||g_t||
                loss, dot = self._gradient(batch, gradient, Role.PERTURBED)  # g~_t = grad f(x~_t; B_t)
            passes[Role.PERTURBED] = (batch, loss, dot, self._recorder.used)
        if Role.LOOKAHEAD in self.roles:
            with self.displaced(Role.LOOKAHEAD):
                self._look_ahead(ascent)  # y_{t+1} = U_{m_t}(x_t, g_t)
                loss, dot = self._gradient(next_batch, gradient, Role.LOOKAHEAD)  # g_{t+1} = grad f(y_{t+1}; B_{t+1})
            passes[Role.LOOKAHEAD] = (next_batch, loss, dot, self._recorder.used)
        found = self._share(passes)
        perturbed, lookahead = found[Role.PERTURBED], found[Role.LOOKAHEAD]
        self._check_pairing(ascent, perturbed)
        # G_t = (1 - lambda) g~_t + lambda g_{t+1}
        interpolate_(self.perturbed_grads.flats, self.ascent_grads.flats, self.lmbda)
        used = [
            (p and self.lmbda < 1) or (n and self.lmbda > 0)
            for p, n in zip(perturbed.used, lookahead.used, strict=True)
        ]
        if lookahead.finite:
            self.ascent = lookahead
        skipped = not (perturbed.finite and lookahead.finite)
        return self._finish(ascent, perturbed, lookahead.loss, used, skipped)

    def forget(self) -> None:
        """Drop g_t: the next step computes it at x_t, as the first one does."""
        self.ascent = None

    def _start(self, batch: Batch, gradient: Callable[[Any], Tensor]) -> Pass:
        """g_t = grad f(x_t; B_t), by the LOOKAHEAD role, so that all ranks hold the same bits of it."""
        passes = {}
        if Role.LOOKAHEAD in self.roles:
            loss, dot = self._gradient(batch, gradient, Role.LOOKAHEAD)
            passes[Role.LOOKAHEAD] = (batch, loss, dot, self._recorder.used)
        else:
            for mine, theirs in zip(self.perturbed_grads.flats, self.ascent_grads.flats, strict=True):
                self.exchange.start(mine, theirs)
            self.exchange.finish()
        return self._share(passes)[Role.LOOKAHEAD]

    def _look_ahead(self, ascent: Pass) -> None:
        # Clipping may scale g_t in place: this role does not read it again.
        for param, grad, used in zip(self.params, self.ascent_grads.views, ascent.used, strict=True):
            param.grad = grad if used else None
        self.clip()
        look_ahead_(self.base_optimizer)

    def _check_pairing(self, ascent: Pass, perturbed: Pass) -> None:
        if ascent.fingerprints != perturbed.fingerprints:
            raise RuntimeError(
                "Expected g_t and g~_t to come from the same batch B_t, but the LOOKAHEAD processes read batches with "
                f"fingerprints {list(ascent.fingerprints)} and the PERTURBED ones {list(perturbed.fingerprints)}. "
                "The processes see different data: give all of them the same dataset in the same order, and draw any "
                "randomness of dataset and collator from torch, numpy or random (they are seeded per item), not from "
                "generators of your own or a sampler that knows its rank."
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
