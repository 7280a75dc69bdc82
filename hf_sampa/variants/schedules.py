"""When to ascend: which steps take the perturbed gradient at all."""

from __future__ import annotations

import torch

from .parts import Moment, When


class Periodic(When):
    """Every k-th step, the first included (LookSAM, Liu et al. 2022).

    Args:
        k: at least 1; 1 is every step.
    """

    def __init__(self, k: int):
        self.k = k

    def __call__(self, now: Moment, norm: float | None) -> bool:
        return now.step % self.k == 0


class Never(When):
    """No step."""

    def __call__(self, now: Moment, norm: float | None) -> bool:
        return False


# Probability of ascending, at a part of the run from 0 to 1; p is its peak, over the run its mean is p or, where it grows, p / 2.
PROBABILITIES = {
    "constant": lambda p, part: p,
    "linear": lambda p, part: p * part,
    "cosine": lambda p, part: p * (1 - torch.cos(torch.tensor(torch.pi * part, dtype=torch.float64)).item()) / 2,
}


class Bernoulli(When):
    """Each step with probability p_t (RST, Zhao et al. 2022b).

    Args:
        p: in [0, 1]; with "constant", 1 is SAM and 0 the base optimizer.
        schedule: "constant", or rising to p at the end of the run: "linear", "cosine".
    """

    def __init__(self, p: float, schedule: str = "constant"):
        self.p, self.schedule = p, schedule

    def __call__(self, now: Moment, norm: float | None) -> bool:
        p = PROBABILITIES[self.schedule](self.p, now.step / max(1, now.max_steps))
        return torch.rand((), generator=now.generator("ascend"), dtype=torch.float64).item() < p


class LargeGradient(When):
    """Steps whose gradient is large by the standard of those before (AE-SAM, Jiang et al. 2023, section 3.2).

    mu_t = delta mu_{t-1} + (1 - delta) ||g_t||^2, s_t^2 = delta s_{t-1}^2 + (1 - delta) (||g_t||^2 - mu_t)^2; ascends where
    ||g_t||^2 >= mu_t + c_t s_t, c_t going from lam2 to lam1 over the run. mu and s begin with the first gradient and 0, a
    choice of ours: the paper does not say.

    Args:
        delta: in [0, 1).
        lam1, lam2: c at the end and at the beginning.
    """

    reads_gradient = True
    state = ("mu", "variance")

    def __init__(self, delta: float, lam1: float, lam2: float):
        self.delta, self.lam1, self.lam2 = delta, lam1, lam2
        self.mu: float | None = None
        self.variance = 0.0

    def __call__(self, now: Moment, norm: float | None) -> bool:
        square = norm**2
        self.mu = square if self.mu is None else self.delta * self.mu + (1 - self.delta) * square
        self.variance = self.delta * self.variance + (1 - self.delta) * (square - self.mu) ** 2
        part = now.step / max(1, now.max_steps)
        c = part * self.lam1 + (1 - part) * self.lam2
        return square >= self.mu + c * self.variance**0.5
