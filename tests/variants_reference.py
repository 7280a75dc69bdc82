"""Every variant once more, serially: each paper's formula on flat vectors, in a loop that takes whole copies of everything.

Nothing of hf_sampa is used here, except where a draw has to be the same: those are handed in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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


def some_tensors(
    rho: float, model, optimizer, schedule, loss, batches, choose: Callable[[int, Tensor], list[bool]]
) -> None:
    """SL-SAM's step, in place: the tensors that are chosen have both gradients and the update, the others rest.

    choose: says which tensors step t is about, given its g_t ``(d,)``, of all of them.
    """
    params = list(model.parameters())
    for t, batch in enumerate(batches):
        x, g = flat(params), gradient(model, loss, batch)
        chosen = choose(t, g)
        kept = torch.cat([torch.full((p.numel(),), float(c)) for p, c in zip(params, chosen, strict=True)])
        g_tilde = gradient(model, loss, batch, x + rho * unit(g * kept))
        for p, each, c in zip(params, cut(g_tilde, params), chosen, strict=True):
            p.grad = each.clone() if c else None
        optimizer.step()
        schedule.step()


class OptSAM(SAM):
    last = None

    def eps(self, t, g, x):
        return torch.zeros_like(x) if self.last is None else self.rho * unit(self.last)

    def mix(self, t, g, g_tilde):
        self.last = g_tilde
        return g_tilde


class MomentumSAM(SAM):
    beta, m = 0.9, None

    def eps(self, t, g, x):
        return torch.zeros_like(x) if self.m is None else -self.rho * unit(self.m)

    def mix(self, t, g, g_tilde):
        self.m = (1 - self.beta) * g_tilde + (0 if self.m is None else self.beta * self.m)
        return g_tilde


class ZSharp(SAM):
    percentile = 0.95

    def eps(self, t, g, x):
        kept = []
        for each in g.split(self.sizes):
            z = ((each - each.mean()) / each.std(correction=0)).abs() if len(each) > 1 else each
            count = max(1, round((1 - self.percentile) * len(each)))
            kept.append(torch.where(z >= z.sort().values[-count], each, 0.0))
        return self.rho * unit(torch.cat(kept))


class PrecondSAM(SAM):
    """With the state of the optimizer that is given to it before the run."""

    optimizer = None

    def eps(self, t, g, x):
        (group,) = {id(each["betas"]): each for each in self.optimizer.param_groups}.values()
        d = []
        for part, p in zip(g.split(self.sizes), self.params, strict=True):
            state = self.optimizer.state.get(p)
            if state:
                v = state["exp_avg_sq"].flatten() / (1 - group["betas"][1] ** state["step"].item())
                part = part / (v.sqrt() + group["eps"])
            d.append(part)
        return self.rho * unit(torch.cat(d))


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


class LESAM(SAM):
    """A run of few steps: the first one is all of the warm-up, and the last two the decay."""

    def eps(self, t, g, x):
        gone = t / self.steps
        sigma = self.rho if gone <= 0.8 else self.rho * 0.5 * (1 + np.cos(np.pi * (gone - 0.8) / 0.2))
        sigma = 0.0 if t == 0 else sigma
        return min(sigma / g.norm(), self.rho / 0.001) * unit(g)


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


def logits_and_labels(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).logits, batch["labels"]


def per_sample(model: nn.Module, batch: Any) -> Tensor:
    """Losses ``(n,)`` of single samples."""
    with torch.no_grad():
        return torch.stack([model(**some(batch, [i])).loss for i in range(len(batch["labels"]))])


def some(batch: Any, chosen: Sequence[int]) -> Any:
    """Samples `chosen` of a batch."""
    return {name: value[list(chosen)] for name, value in batch.items()}


def at(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of `model` with weights `x`."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, part in zip(moved.parameters(), cut(x, list(moved.parameters())), strict=True):
            p.copy_(part)
    return moved


def step_by_step(step: Callable, model, optimizer, schedule, batches) -> None:
    """T = len(batches) - 1 steps; `step` gives G_t for the model, t, B_t and B_{t+1}."""
    for t, (batch, next_batch) in enumerate(zip(batches[:-1], batches[1:], strict=True)):
        update(model, optimizer, step(model, t, batch, next_batch))
        schedule.step()


def sam_gradient(model, loss, batch, rho, descent_batch=None) -> Tensor:
    """grad f(x + rho g / ||g||; descent_batch), g = grad f(x; batch)."""
    g = gradient(model, loss, batch)
    return gradient(
        model, loss, batch if descent_batch is None else descent_batch, flat(list(model.parameters())) + rho * unit(g)
    )


def sam_db(loss, rho):
    return lambda model, t, batch, next_batch: sam_gradient(model, loss, next_batch, rho, batch)


def ksam(loss, rho, k):
    def step(model, t, batch, next_batch):
        losses = per_sample(model, batch).tolist()
        chosen = sorted(range(len(losses)), key=lambda i: -losses[i])[:k]
        return sam_gradient(model, loss, some(batch, chosen), rho)

    return step


def esam_selection(loss, rho, gamma):
    """ESAM with beta = 1."""

    def step(model, t, batch, next_batch):
        x = flat(list(model.parameters()))
        moved = at(model, x + rho * unit(gradient(model, loss, batch)))
        rise = (per_sample(moved, batch) - per_sample(model, batch)).tolist()
        chosen = sorted(range(len(rise)), key=lambda i: -rise[i])[: int(gamma * len(rise))]
        return gradient(moved, loss, some(batch, chosen))

    return step


def bisam_loss(model, batch):
    """-log, mu = 1: mean over samples of log sum_j exp(phi(z_j - z_y))."""
    logits, labels = logits_and_labels(model, batch)
    gamma = torch.log(torch.tensor(torch.e) - 1)
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        phi = 1 - torch.log(1 + torch.exp(gamma - (z - z[y])))
        total = total + torch.log(torch.exp(phi).sum())
    return total / len(labels)


def functional_sam(loss, rho):
    """J(x + eps)^T times the slope of the cross entropy at the logits of x."""

    def step(model, t, batch, next_batch):
        x = flat(list(model.parameters()))
        logits = model(**batch).logits.detach().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, batch["labels"]), logits)

        def pulled_back(model, batch):
            return (model(**batch).logits * slope).sum()

        return gradient(model, pulled_back, batch, x + rho * unit(gradient(model, loss, batch)))

    return step


def functional_sam_parallel(loss, rho, lmbda, model, optimizer, schedule, batches) -> None:
    """The slope at the logits is that of y_t, where g_t is taken."""

    def slope_at(model, batch):
        logits = model(**batch).logits.detach().requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(logits, batch["labels"]), logits)[0]

    g, slope = gradient(model, loss, batches[0]), slope_at(model, batches[0])
    for batch, next_batch in zip(batches[:-1], batches[1:], strict=True):
        x_tilde = flat(list(model.parameters())) + rho * unit(g)
        g_tilde = gradient(model, lambda m, b, slope=slope: (m(**b).logits * slope).sum(), batch, x_tilde)
        y, y_optimizer = copy.deepcopy((model, optimizer))
        update(y, y_optimizer, g)
        g, slope = gradient(y, loss, next_batch), slope_at(y, next_batch)
        update(model, optimizer, (1 - lmbda) * g_tilde + lmbda * g)
        schedule.step()


def bisam(loss, rho):
    def step(model, t, batch, next_batch):
        x = flat(list(model.parameters()))
        return gradient(model, loss, batch, x + rho * unit(gradient(model, bisam_loss, batch)))

    return step


def bisam_parallel(loss, rho, lmbda, model, optimizer, schedule, batches) -> None:
    """One gradient of B_{t+1}, that of BiSAM's loss, for the direction, the look-ahead and the mix."""
    g = gradient(model, bisam_loss, batches[0])
    for batch, next_batch in zip(batches[:-1], batches[1:], strict=True):
        g_tilde = gradient(model, loss, batch, flat(list(model.parameters())) + rho * unit(g))
        y, y_optimizer = copy.deepcopy((model, optimizer))
        update(y, y_optimizer, g)
        g = gradient(y, bisam_loss, next_batch)
        update(model, optimizer, (1 - lmbda) * g_tilde + lmbda * g)
        schedule.step()


def distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), a mean over samples."""
    p, q = torch.softmax(teacher / tau, dim=1), torch.softmax(student / tau, dim=1)
    return tau**2 * (p * (p.log() - q.log())).sum(dim=1).mean()


def mesa(loss, lam, tau, decay):
    teacher = None

    def step(model, t, batch, next_batch):
        nonlocal teacher
        x = flat(list(model.parameters()))
        teacher = x if teacher is None else decay * teacher + (1 - decay) * x
        with torch.no_grad():
            said = at(model, teacher)(**batch).logits
        return gradient(model, lambda m, b: loss(m, b) + lam * distillation(m(**b).logits, said, tau), batch)

    return step


def saf(loss, lam, tau, epochs, batches_per_epoch):
    """On a sequential stream, where batch t of an epoch holds the same samples in every epoch."""
    said: dict[int, Tensor] = {}

    def step(model, t, batch, next_batch):
        teacher = said.get(t - epochs * batches_per_epoch)
        with torch.no_grad():
            said[t] = model(**batch).logits
        if teacher is None:
            return gradient(model, loss, batch)
        return gradient(model, lambda m, b: loss(m, b) + lam * distillation(m(**b).logits, teacher, tau), batch)

    return step


def shards_of(batch: Any, size: int) -> list[tuple[Any, float]]:
    """Shards of `size` samples, and their parts of the batch."""
    n = len(batch["labels"])
    places = [range(start, min(start + size, n)) for start in range(0, n, size)]
    return [(some(batch, each), len(each) / n) for each in places]


def msam(loss, rho, size):
    def step(model, t, batch, next_batch):
        return sum(part * sam_gradient(model, loss, shard, rho) for shard, part in shards_of(batch, size))

    return step


def msam_parallel(loss, rho, lmbda, size, model, optimizer, schedule, batches) -> None:
    """The g_j of a batch are taken at the look-ahead weights; their mean is g."""
    gs = [gradient(model, loss, shard) for shard, _ in shards_of(batches[0], size)]
    for batch, next_batch in zip(batches[:-1], batches[1:], strict=True):
        x, shards = flat(list(model.parameters())), shards_of(batch, size)
        g_tilde = sum(p * gradient(model, loss, s, x + rho * unit(g)) for (s, p), g in zip(shards, gs, strict=True))
        y, y_optimizer = copy.deepcopy((model, optimizer))
        update(y, y_optimizer, sum(p * g for (_, p), g in zip(shards, gs, strict=True)))
        gs = [gradient(y, loss, shard) for shard, _ in shards_of(next_batch, size)]
        g_next = sum(p * g for (_, p), g in zip(shards_of(next_batch, size), gs, strict=True))
        update(model, optimizer, (1 - lmbda) * g_tilde + lmbda * g_next)
        schedule.step()


def bisam_parallel_own(loss, rho, lmbda, model, optimizer, schedule, batches) -> None:
    """BiSAM's loss for the direction alone; the trainer's own for the look-ahead and the mix."""
    h, g = gradient(model, bisam_loss, batches[0]), gradient(model, loss, batches[0])
    for batch, next_batch in zip(batches[:-1], batches[1:], strict=True):
        g_tilde = gradient(model, loss, batch, flat(list(model.parameters())) + rho * unit(h))
        y, y_optimizer = copy.deepcopy((model, optimizer))
        update(y, y_optimizer, g)
        h, g = gradient(y, bisam_loss, next_batch), gradient(y, loss, next_batch)
        update(model, optimizer, (1 - lmbda) * g_tilde + lmbda * g)
        schedule.step()
