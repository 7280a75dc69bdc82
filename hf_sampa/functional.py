"""SAMPa's arithmetic as pure tensor functions.

One symbol table for the whole package (Xie, Pethick, Cevher, NeurIPS 2024, arXiv 2410.10683, Algorithm 2):

=============  ====================  ===========================================================
paper          code                  meaning
=============  ====================  ===========================================================
x_t            ``params``            weights
g_t            ``ascent_grads``      grad f(y_t; B_t), carried from the step before
x~_t           perturbed weights     x_t + rho g_t / ||g_t||
g~_t           ``perturbed_grads``   grad f(x~_t; B_t)
y_{t+1}        look-ahead weights    where the base optimizer would go from x_t with g_t
g_{t+1}        ``lookahead_grads``   grad f(y_{t+1}; B_{t+1}), the next step's g_t
G_t            SAMPa gradient        (1 - lambda) g~_t + lambda g_{t+1}
rho, lambda    ``rho``, ``lmbda``    radius of the perturbation, weight of the look-ahead gradient
=============  ====================  ===========================================================

Lists hold one tensor per parameter (or per bucket of parameters); a trailing underscore means in place, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


# Keeps rho g / ||g|| finite when g is exactly zero; far below one unit in the last place of any norm that matters.
NORM_GUARD = 1e-12


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all entries of all `tensors`, as a scalar float64 tensor ``()`` on their device.

    The partial norms are added in double precision, so that the number of buckets hardly shows in the result.
    """
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return torch.linalg.vector_norm(norms.double())


@torch.no_grad()
def global_dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product over all entries of two lists of equal shapes, as a scalar float64 tensor ``()``."""
    dots = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    return torch.stack(dots).double().sum()


@torch.no_grad()
def perturb_(params: Sequence[Tensor], ascent_grads: Sequence[Tensor], rho: float, norm: float | None = None) -> None:
    """Move `params` to the perturbed weights, x~_t = x_t + rho g_t / ||g_t|| (Algorithm 2, perturbation).

    Args:
        params: weights, changed in place.
        ascent_grads: g_t, same shapes; left alone.
        rho: radius of the perturbation, in the units of the weights, >= 0.
        norm: ||g_t|| where the caller has it; computed over all of `ascent_grads` otherwise (a host-device sync).
    """
    norm = global_norm(ascent_grads).item() if norm is None else norm
    torch._foreach_add_(list(params), list(ascent_grads), alpha=rho / (norm + NORM_GUARD))


@torch.no_grad()
def interpolate_(perturbed_grads: Sequence[Tensor], lookahead_grads: Sequence[Tensor], lmbda: float) -> None:
    """Turn `perturbed_grads` into the SAMPa gradient, G_t = (1 - lambda) g~_t + lambda g_{t+1}.

    lambda = 0 leaves g~_t as it is, bit for bit. `lookahead_grads` is only read: it is the next step's g_t.
    """
    if lmbda == 0.0:
        return
    perturbed_grads = list(perturbed_grads)
    torch._foreach_mul_(perturbed_grads, 1.0 - lmbda)
    torch._foreach_add_(perturbed_grads, list(lookahead_grads), alpha=lmbda)
