"""Algorithm 2 and SAM once more, serially and without any trick: whole copies of model and optimizer, paper order.

Nothing of hf_sampa is used here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def grad(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> list[Tensor]:
    """grad f(model; batch), a zero tensor for parameters that the loss does not reach."""
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(model, batch), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def perturbed(model: nn.Module, g: list[Tensor], rho: float) -> nn.Module:
    """A copy of `model` at x + rho g / ||g||."""
    moved = copy.deepcopy(model)
    norm = torch.sqrt(sum((each.double() ** 2).sum() for each in g)).float()
    with torch.no_grad():
        for p, each in zip((p for p in moved.parameters() if p.requires_grad), g, strict=True):
            p += rho * each / norm
    return moved


def update(model: nn.Module, optimizer: torch.optim.Optimizer, g: list[Tensor], max_norm: float) -> None:
    """x, m <- U_m(x, g): clip, then the base optimizer's step."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p, each in zip(params, g, strict=True):
        p.grad = each.clone()
    if max_norm:
        nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()


def sampa(model, optimizer, schedule, loss, batches: Sequence[Any], *, rho, lmbda, max_norm=0.0) -> list[float]:
    """T steps on T + 1 batches, in place; returns f(y_{t+1}; B_{t+1}) of each step."""
    losses = []
    g = grad(model, loss, batches[0])
    for batch, next_batch in zip(batches[:-1], batches[1:], strict=True):
        g_tilde = grad(perturbed(model, g, rho), loss, batch)
        y, y_optimizer = copy.deepcopy((model, optimizer))
        update(y, y_optimizer, g, max_norm)
        losses.append(loss(y, next_batch).item())
        g_next = grad(y, loss, next_batch)
        mixed = [(1 - lmbda) * a + lmbda * b for a, b in zip(g_tilde, g_next, strict=True)]
        update(model, optimizer, mixed, max_norm)
        schedule.step()
        g = g_next
    return losses


def sam(model, optimizer, schedule, loss, batches: Sequence[Any], *, rho, max_norm=0.0) -> list[float]:
    """One step per batch, in place; returns f(x_t; B_t) of each step."""
    losses = []
    for batch in batches:
        losses.append(loss(model, batch).item())
        g = grad(model, loss, batch)
        update(model, optimizer, grad(perturbed(model, g, rho), loss, batch), max_norm)
        schedule.step()
    return losses
