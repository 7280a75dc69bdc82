"""Every variant once more, serially: each paper's formula on flat vectors, in a loop that takes whole copies of everything.

Nothing of hf_sampa is used here, except where a draw has to be the same: those are handed in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests import reference


def unit(v: Tensor) -> Tensor:
    """v / ||v||, or v where it is zero."""
    norm = v.double().norm().float()
    return v / norm if norm > 0 else v


class SAM:
    """Hooks of a step on flat vectors ``(d,)``; those of SAM itself."""

    def __init__(self, rho: float, model: nn.Module, steps: int):
        self.rho, self.steps = rho, steps
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.sizes = [p.numel() for _, p in named]

    def per_tensor(self, values: Sequence[float]) -> Tensor:
        """One value per tensor, spread over its entries."""
        return torch.cat([torch.full((size,), float(v)) for v, size in zip(values, self.sizes, strict=True)])

    def ascends(self, t: int, g: Tensor) -> bool:
        return True

    def eps(self, t: int, g: Tensor, x: Tensor) -> Tensor:
        return self.rho * unit(g)

    def mix(self, t: int, g: Tensor, g_tilde: Tensor) -> Tensor:
        return g_tilde

    def reuse(self, t: int, g: Tensor) -> Tensor:
        return g


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def cut(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def gradient(model: nn.Module, loss: Callable, batch: Any, x: Tensor | None = None) -> Tensor:
    """grad f(x; batch), by default at the model's own weights."""
    moved = copy.deepcopy(model)
    if x is not None:
        params = list(moved.parameters())
        with torch.no_grad():
            for p, part in zip(params, cut(x, params), strict=True):
                p.copy_(part)
    return flat(reference.grad(moved, loss, batch))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, g: Tensor) -> None:
    reference.update(model, optimizer, cut(g, list(model.parameters())), 0.0)


def sequential(rule: SAM, model, optimizer, schedule, loss, batches) -> list[bool]:
    """One step per batch, in place; returns which steps ascended."""
    ascended = []
    for t, batch in enumerate(batches):
        x, g = flat(list(model.parameters())), gradient(model, loss, batch)
        ascended.append(rule.ascends(t, g))
        if ascended[-1]:
            g_tilde = gradient(model, loss, batch, x + rule.eps(t, g, x))
            update(model, optimizer, rule.mix(t, g, g_tilde))
        else:
            update(model, optimizer, rule.reuse(t, g))
        schedule.step()
    return ascended


def parallel(rule: SAM, model, optimizer, schedule, loss, batches, lmbda: float) -> None:
    """SAMPa's timing: T steps on T + 1 batches, in place."""
    g = gradient(model, loss, batches[0])
    for t, (batch, next_batch) in enumerate(zip(batches[:-1], batches[1:], strict=True)):
        x = flat(list(model.parameters()))
        g_tilde = gradient(model, loss, batch, x + rule.eps(t, g, x))
        y, y_optimizer = copy.deepcopy((model, optimizer))
        update(y, y_optimizer, g)
        g_next = gradient(y, loss, next_batch)
        update(model, optimizer, (1 - lmbda) * rule.mix(t, g, g_tilde) + lmbda * g_next)
        schedule.step()
        g = g_next


class OptSAM(SAM):
    last = None

    def eps(self, t, g, x):
        return torch.zeros_like(x) if self.last is None else self.rho * unit(self.last)

    def mix(self, t, g, g_tilde):
        self.last = g_tilde
        return g_tilde


class GNP(SAM):
    alpha = 0.8

    def mix(self, t, g, g_tilde):
        return (1 - self.alpha) * g + self.alpha * g_tilde


class ASAM(SAM):
    eta = 0.01

    def eps(self, t, g, x):
        is_weight = self.per_tensor(["weight" in name for name in self.names]).bool()
        T = torch.where(is_weight, x.abs() + self.eta, 1.0)
        return self.rho * T**2 * g / (T * g).norm()


class VaSSO(SAM):
    theta = 0.4
    v = None

    def eps(self, t, g, x):
        self.v = g if self.v is None else (1 - self.theta) * self.v + self.theta * g
        return self.rho * unit(self.v)


class FSAM(SAM):
    sigma, lam = 1.0, 0.9
    m = None

    def eps(self, t, g, x):
        d = g if self.m is None else g - self.sigma * self.m
        self.m = g if self.m is None else self.lam * self.m + (1 - self.lam) * g
        return self.rho * unit(d)


class SAMON(SAM):
    def eps(self, t, g, x):
        return self.rho * unit(g * self.per_tensor(["LayerNorm" in name for name in self.names]))


class LookSAM(SAM):
    k, alpha = 5, 0.7
    g_v = None

    def ascends(self, t, g):
        return t % self.k == 0

    def mix(self, t, g, g_tilde):
        cosine = torch.dot(g, g_tilde) / (g.norm() * g_tilde.norm())
        self.g_v = g_tilde - g_tilde.norm() * cosine * g / g.norm()
        return g_tilde

    def reuse(self, t, g):
        return g + self.alpha * g.norm() / self.g_v.norm() * self.g_v


class AESAM(SAM):
    delta, lam1, lam2 = 0.9, -1.0, 1.0
    mu, variance = None, 0.0

    def ascends(self, t, g):
        square = g.double().norm().item() ** 2
        self.mu = square if self.mu is None else self.delta * self.mu + (1 - self.delta) * square
        self.variance = self.delta * self.variance + (1 - self.delta) * (square - self.mu) ** 2
        c = t / self.steps * self.lam1 + (1 - t / self.steps) * self.lam2
        return square >= self.mu + c * self.variance**0.5


class StableSAM(SAM):
    def eps(self, t, g, x):
        return self.rho * g

    def mix(self, t, g, g_tilde):
        return g.norm() / g_tilde.norm() * g_tilde


class GSAM(SAM):
    alpha = 0.4

    def mix(self, t, g, g_tilde):
        along = torch.dot(g, unit(g_tilde)) * unit(g_tilde)
        return g_tilde - self.alpha * (g - along)


class ReusePSF(SAM):
    """vSAM's reuse, with a given choice of steps."""

    beta, max_age = 0.7, 6
    chosen: Sequence[int] = ()

    def ascends(self, t, g):
        return t in self.chosen

    def mix(self, t, g, g_tilde):
        self.psf, self.age = g_tilde - g, 0
        return g_tilde

    def reuse(self, t, g):
        self.age += 1
        return g + self.beta**self.age * self.psf if self.age <= self.max_age else g
