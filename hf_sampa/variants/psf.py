"""Reuse of the perturbed step's second-order part, PSF_t = g~_t - g_t (vSAM, Deng et al. 2024; ARSAM, Deng and Pang 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import ratio
from .mixing import Stored
from .parts import Mixing, Moment, Norms, When


class ReusedPSF(Stored):
    """G_t = g~_t in a step that ascends, and g_t + c_j PSF in the j-th step after it, up to an age; then g_t.

    Args:
        beta: c_j = beta^j, in [0, 1]; 1 keeps it whole.
        max_age: steps that use one PSF, at least 0.
    """

    on_shards = True
    state = (*Stored.state, "age")

    def __init__(self, beta: float, max_age: int):
        super().__init__()
        self.beta, self.max_age = beta, max_age
        self.age = 0

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        self.store(torch._foreach_sub(g_tilde, list(g)))
        self.age = 0

    def reuse(self, g: list[Tensor], now: Moment) -> None:
        self.age += 1
        if self.vector is not None and self.age <= self.max_age:
            torch._foreach_add_(g, self.vector, alpha=self.beta**self.age)

    def reached(self, ascent: Sequence[bool], perturbed: Sequence[bool] | None) -> list[bool]:
        return Mixing.reached(self, ascent, None) if self._plain(perturbed) else super().reached(ascent, perturbed)

    def _plain(self, perturbed: Sequence[bool] | None) -> bool:
        return perturbed is None and self.age > self.max_age


class Quota(When):
    """So many steps of each window ascend as the PSF changes (vSAM's schedule).

    Of every `window` steps int(S) ascend: each with probability q while the quota lasts, and all that are left where no more
    steps are left than quota. After each window, with r = ||PSF|| / ||g|| and v, the variance of ||PSF|| (within five blocks
    of the sorted values, on average), of the last `window` steps that ascended:
    S <- clip(S (1 + a1 a + a2 b), 1, most * window), q = S / window, a and b being the mean relative changes of r and of v
    from one such step to the next, within [-1, 1]. Before that S is `start` and q is 0.5.

    Args:
        window: K, at least 5.
        start: S_0, from 1 to `window`.
        most: part of a window that S may reach, in (0, 1].
        a1, a2: weights of the two changes, at least 0.
        tensors: norms are those of the last so many parameters, at least 1.
        warmup: part of the run at whose beginning every step ascends, in [0, 1].
    """

    on_shards = True
    state = ("quota", "left", "norms", "ratios", "variances", "measured")

    def __init__(self, window: int, start: float, most: float, a1: float, a2: float, tensors: int, warmup: float):
        self.window, self.most, self.a1, self.a2 = window, most, a1, a2
        self.tensors, self.warmup = tensors, warmup
        self.quota, self.left = float(start), int(start)
        self.measured = False
        self.norms: list[float] = []
        self.ratios: list[float] = []
        self.variances: list[float] = []

    def __call__(self, now: Moment, norm: float | None) -> bool:
        if now.step % self.window == 0 and now.step:
            self._renew()
        if now.step < self.warmup * now.max_steps:
            return True
        if self.left <= 0:
            return False
        q = self.quota / self.window if self.measured else 0.5
        forced = self.window - now.step % self.window <= self.left
        ascends = forced or torch.rand((), generator=now.generator("quota"), dtype=torch.float64).item() < q
        self.left -= ascends
        return ascends

    def observe(self, g: Sequence[Tensor], g_tilde: Sequence[Tensor], now: Moment) -> None:
        last, last_tilde = list(g)[-self.tensors :], list(g_tilde)[-self.tensors :]
        norm = now.norm(torch._foreach_sub(last_tilde, last)).item()
        self.norms = [*self.norms, norm][-self.window :]
        self.ratios = [*self.ratios, ratio(norm, now.norm(last).item())][-self.window :]
        blocks = torch.tensor(sorted(self.norms), dtype=torch.float64).tensor_split(5)
        variance = sum(block.var(correction=0).item() for block in blocks if block.numel()) / 5
        self.variances = [*self.variances, variance][-self.window :]

    def _renew(self) -> None:
        a, b = relative_change(self.ratios), relative_change(self.variances)
        if len(self.ratios) > 1:
            self.quota = min(max(self.quota * (1 + self.a1 * a + self.a2 * b), 1.0), self.most * self.window)
            self.measured = True
        self.left = int(self.quota)


def relative_change(values: Sequence[float]) -> float:
    """Mean of (next - this) / this over `values`, within [-1, 1]; 0 where there is none."""
    changes = [(after - before) / before for before, after in zip(values, values[1:], strict=False) if before]
    return min(1.0, max(-1.0, sum(changes) / len(changes))) if changes else 0.0
