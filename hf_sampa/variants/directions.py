"""Directions: how g_t becomes the perturbation eps_t."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .masks import top
from .parts import Direction, Moment


class Unnormalized(Direction):
    """eps_t = rho g_t (USAM, Andriushchenko and Flammarion 2022)."""

    on_shards, unit = True, False

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> float | Tensor:
        return 1.0


class ScheduledRadius(Direction):
    """SAM's direction, with a radius that follows the learning rate (GSAM, Zhuang et al. 2022, section 4.3).

    rho_t = rho (low + (1 - low) lr_t / lr_peak).

    Args:
        low: what part of rho is left where the learning rate is 0, in [0, 1].
    """

    def __init__(self, low: float):
        self.low = low

    def radius(self, now: Moment) -> float:
        return self.low + (1 - self.low) * now.lr_fraction


class LossBudget(Direction):
    """eps_t = rho_t g_t / ||g_t||, rho_t = sigma_t / max(||g_t||, floor) (LE-SAM, Wang et al. 2026): to first order the loss rises by sigma_t.

    sigma_t rises to `rho` on a line, stays there, and falls to 0 as half a cosine; here in every step, in the authors' code after
    every epoch. There rho_t is bounded, which `floor` does: it is at most rho / floor.

    Args:
        floor: gradient norms below it count as it, >= 0.
        warmup: what part of the run sigma_t rises in, in [0, 1].
        decay: what part of the run, at its end, sigma_t falls in, in [0, 1].
    """

    on_shards, unit = True, False

    def __init__(self, floor: float, warmup: float, decay: float):
        self.floor, self.warmup, self.decay = floor, warmup, decay

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> float | Tensor:
        return norm * (norm.clamp(min=self.floor) if isinstance(norm, Tensor) else max(norm, self.floor))

    def radius(self, now: Moment) -> float:
        gone = now.step / now.max_steps
        if gone < self.warmup:
            return gone / self.warmup
        if gone <= 1 - self.decay:
            return 1.0
        return (1 + math.cos(math.pi * (gone - (1 - self.decay)) / self.decay)) / 2


class Adaptive(Direction):
    """eps_t = rho T^2 g_t / ||T g_t|| (ASAM, Kwon et al. 2021, eq. 8).

    T = |x_t| + eta, entry by entry, for parameters that are called a weight, and 1 for the others.

    Args:
        eta: at least 0; keeps weights of zero from staying where they are.
    """

    on_shards, unit = True, False

    def __init__(self, eta: float):
        self.eta = eta
        self.scaled: list[bool] = []

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        self.scaled = ["weight" in name for name in names]

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> Tensor:
        pairs = [(each, w) for each, w, scaled in zip(g, x, self.scaled, strict=True) if scaled]
        for each, w in pairs:
            each.mul_(w.abs().add_(self.eta))
        norm = now.norm(g)
        for each, w in pairs:
            each.mul_(w.abs().add_(self.eta))
        return norm


class Smoothed(Direction):
    """eps_t = rho v_t / ||v_t||, v_t = (1 - theta) v_{t-1} + theta g_t, v_0 = g_0 (VaSSO, Li and Giannakis 2023, eq. 4).

    Args:
        theta: in (0, 1]; 1 is SAM.
    """

    on_shards = True
    state = ("v",)

    def __init__(self, theta: float):
        self.theta = theta
        self.v: list[Tensor] | None = None

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> Tensor:
        if self.v is None:
            self.v = [each.clone() for each in g]
        else:
            torch._foreach_lerp_(self.v, g, self.theta)
        torch._foreach_copy_(g, self.v)
        return now.norm(g)


class Friendly(Direction):
    """eps_t = rho d_t / ||d_t||, d_t = g_t - sigma m_{t-1}, m_t = lam m_{t-1} + (1 - lam) g_t (F-SAM, Li et al. 2024).

    In the first step d_0 = m_0 = g_0.

    Args:
        sigma: how much of the running mean is taken away; 0 is SAM.
        lam: of the mean, in [0, 1).
    """

    on_shards = True
    state = ("m",)

    def __init__(self, sigma: float, lam: float):
        self.sigma, self.lam = sigma, lam
        self.m: list[Tensor] | None = None

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> Tensor:
        if self.m is None:
            self.m = [each.clone() for each in g]
            return now.norm(g)
        for each, m in zip(g, self.m, strict=True):
            mean = torch.lerp(m, each, 1 - self.lam)
            each.sub_(m, alpha=self.sigma)
            m.copy_(mean)
        return now.norm(g)


class Preconditioned(Direction):
    """eps_t = rho d_t / ||d_t||, d_t = g_t / (sqrt(v_t) + eps), v_t Adam's second moment before the step (after Singh et al. 2025).

    A parameter without one, as all in the first step, has d_t = g_t. Needs an optimizer with Adam's state.
    """

    on_shards = reads_optimizer = True

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> Tensor:
        for each, denominator in zip(g, now.adam_denominators(), strict=False):
            if denominator is not None:
                each.div_(denominator)
        return now.norm(g)


class ZScores(Direction):
    """eps_t = rho d_t / ||d_t||, d_t being g_t where it stands out within its tensor, and 0 elsewhere (ZSharp, Yun 2025).

    Of each tensor the entries with the largest |g - mean(g)| / std(g) are kept, one at least, the first of equal ones.

    Args:
        percentile: which part of the entries is left out, in [0, 1); 0 is SAM.
    """

    def __init__(self, percentile: float):
        self.percentile = percentile

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> float | Tensor:
        if self.percentile == 0:
            return norm
        for each in g:
            count = max(1, round((1 - self.percentile) * each.numel()))
            # Within a tensor the deviation is one number, which changes no order.
            each.mul_(top((each - each.mean()).abs().reshape(-1), count).view(each.shape))
        return now.norm(g)


class Momentum(Direction):
    """eps_t = -rho m_{t-1} / ||m_{t-1}||, m_t = beta m_{t-1} + (1 - beta) g~_t, eps_0 = 0 (Momentum-SAM, Becker et al. 2024).

    Against the momentum, as the authors' code has it: that is uphill of the way that the weights went.

    Args:
        beta: of the momentum, in [0, 1).
    """

    on_shards = True
    needs_gradient = False
    state = ("m",)

    def __init__(self, beta: float):
        self.beta = beta
        self.m: list[Tensor] | None = None

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor | None, now: Moment) -> Tensor:
        if self.m is None:
            torch._foreach_zero_(g)
        else:
            torch._foreach_copy_(g, self.m)
            torch._foreach_neg_(g)
        return now.norm(g)

    def observe(self, g_tilde: Sequence[Tensor]) -> None:
        if self.m is None:
            self.m = list(torch._foreach_mul(list(g_tilde), 1 - self.beta))
        else:
            torch._foreach_lerp_(self.m, list(g_tilde), 1 - self.beta)


class Random(Direction):
    """eps_t = rho e_t / ||e_t||, e_t ~ N(0, I) over all parameters (RandSAM; a control in Xie et al. 2024, section 2.2)."""

    needs_gradient = False

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor | None, now: Moment) -> Tensor:
        generator = now.generator("random direction", g[0].device)
        for each in g:
            each.normal_(generator=generator)
        return now.norm(g)


class Previous(Direction):
    """eps_t = rho g~_{t-1} / ||g~_{t-1}||, eps_0 = 0 (OptSAM; a control in Xie et al. 2024, section 2.2)."""

    on_shards = True
    needs_gradient = False
    state = ("last",)

    def __init__(self):
        self.last: list[Tensor] | None = None

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor | None, now: Moment) -> Tensor:
        if self.last is None:
            torch._foreach_zero_(g)
        else:
            torch._foreach_copy_(g, self.last)
        return now.norm(g)

    def observe(self, g_tilde: Sequence[Tensor]) -> None:
        if self.last is None:
            self.last = [each.clone() for each in g_tilde]
        else:
            torch._foreach_copy_(self.last, list(g_tilde))
