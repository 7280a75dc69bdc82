"""Mixing: how g_t and g~_t become the gradient of the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import ratio
from .parts import Mixing, Moment, Norms


class Penalty(Mixing):
    """G_t = (1 - alpha) g_t + alpha g~_t: a penalty on the gradient's norm (Zhao et al. 2022a, eq. 12).

    Args:
        alpha: in [0, 1]; 1 is SAM, 0 the base optimizer.
    """

    needs_ascent = by_entries = on_shards = True

    def __init__(self, alpha: float):
        self.alpha = alpha

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        if self.alpha < 1:
            torch._foreach_lerp_(g_tilde, list(g), 1 - self.alpha)


class Rescaled(Mixing):
    """G_t = ||g_t|| / ||g~_t|| g~_t (Stable SAM, Tan et al. 2024)."""

    by_entries = on_shards = True

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        torch._foreach_mul_(g_tilde, ratio(norms.ascent, norms.perturbed))


class SurrogateGap(Mixing):
    """G_t = g~_t - alpha g_perp, g_perp the part of g_t that is orthogonal to g~_t (GSAM, Zhuang et al. 2022, Algorithm 1).

    Args:
        alpha: at least 0; 0 is SAM.
    """

    needs_ascent = reads_dot = by_entries = on_shards = True

    def __init__(self, alpha: float):
        self.alpha = alpha

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        if self.alpha:
            along = ratio(ratio(norms.dot, norms.perturbed), norms.perturbed)
            torch._foreach_mul_(g_tilde, 1 + self.alpha * along)
            torch._foreach_add_(g_tilde, list(g), alpha=-self.alpha)


class Stored(Mixing):
    """Something of a step that ascended is kept for the steps that do not. Subclasses say what, and how it is mixed."""

    needs_ascent = True
    state = ("vector", "has")

    def __init__(self):
        self.vector: list[Tensor] | None = None
        self.has: list[bool] | None = None  # which parameters the vector has a part of

    def store(self, vector: Sequence[Tensor]) -> None:
        """Keep `vector`."""
        if self.vector is None:
            self.vector = list(vector)  # what torch._foreach functions return is a tuple
        else:
            torch._foreach_copy_(self.vector, vector)

    def reached(self, ascent: Sequence[bool], perturbed: Sequence[bool] | None) -> list[bool]:
        if perturbed is None:
            return [a or b for a, b in zip(ascent, self.has or ascent, strict=True)]
        self.has = [a or p for a, p in zip(ascent, perturbed, strict=True)]
        return list(perturbed)


class Orthogonal(Stored):
    """g_v = g~ - ||g~|| cos(g, g~) g / ||g|| is kept, G_t = g_t + alpha ||g_t|| / ||g_v|| g_v (LookSAM, Liu et al. 2022, Alg. 1).

    Args:
        alpha: at least 0.
    """

    reads_dot = on_shards = True

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        along = ratio(ratio(norms.dot, norms.ascent), norms.ascent)
        self.store(torch._foreach_add(g_tilde, list(g), alpha=-along))

    def reuse(self, g: list[Tensor], now: Moment) -> None:
        if self.vector is not None:
            scale = self.alpha * ratio(now.norm(g), now.norm(self.vector)).item()
            torch._foreach_add_(g, self.vector, alpha=scale)
