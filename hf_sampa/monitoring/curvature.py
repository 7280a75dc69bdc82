"""How sharp a loss is around the weights, as pure functions of whoever computes losses and products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..functional import global_norm, inner, real


def hessian_product(losses: Sequence[Tensor], params: Sequence[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """What multiplies a vector by the Hessian of the sum of `losses`, each ``()``, whose graphs it keeps.

    The vector and the product have one tensor per parameter, of its shape. The losses must be differentiable twice, which
    torch's fused attention is not: compute them under ``sdpa_kernel(SDPBackend.MATH)``.
    """
    grads = torch.autograd.grad(sum(losses), params, create_graph=True, allow_unused=True)
    reached = [grad is not None and grad.requires_grad for grad in grads]

    def product(vector: list[Tensor]) -> list[Tensor]:
        if not any(reached):
            return [torch.zeros_like(param) for param in params]
        outputs = [grad for grad, own in zip(grads, reached, strict=True) if own]
        weights = [part for part, own in zip(vector, reached, strict=True) if own]
        found = torch.autograd.grad(outputs, params, weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if part is None else part for p, part in zip(params, found, strict=True)]

    return product


def largest_eigenvalue(
    product: Callable[[list[Tensor]], list[Tensor]], start: list[Tensor], iterations: int = 20, tolerance: float = 0.01
) -> float:
    """Largest eigenvalue of a symmetric operator, by power iteration.

    That finds the eigenvalue of largest magnitude. Where this is not a positive one, or where there are two of opposite sign,
    what has been found of its magnitude is added to the operator, whose largest eigenvalue then is that of largest magnitude.

    Args:
        product: multiplies a vector by the operator.
        start: a vector, at random as a rule; not orthogonal to the eigenvector.
        iterations: at most so many products, or twice as many where something is added.
        tolerance: relative change from one iteration to the next at which to stop.
    """
    value, magnitude = _dominant(product, start, 0.0, iterations, tolerance)
    if value < (1 - tolerance) * magnitude:
        value, _ = _dominant(product, start, magnitude, iterations, tolerance)
    return value


def _dominant(
    product: Callable[[list[Tensor]], list[Tensor]],
    start: list[Tensor],
    shift: float,
    iterations: int,
    tolerance: float,
) -> tuple[float, float]:
    """Rayleigh quotient of the operator, and norm of what it makes of a unit vector, where the shifted one has led to."""
    vector, norm, found, value = start, global_norm(start).item(), math.nan, math.nan
    for _ in range(iterations):
        vector = torch._foreach_div(vector, norm)
        moved = product(vector)
        value = inner(real(vector), real(moved), (1.0, global_norm(moved).item())).sum().item()
        moved = torch._foreach_add(moved, vector, alpha=shift)
        norm = global_norm(moved).item()
        before, found = found, norm - shift
        if norm == 0 or abs(found - before) <= tolerance * abs(found):
            break
        vector = moved
    return value, norm
