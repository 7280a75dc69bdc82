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
def perturb(
    params: Sequence[Tensor],
    ascent_grads: Sequence[Tensor],
    rho: float,
    norm: float | Tensor,
    *,
    out: Sequence[Tensor],
) -> None:
    """Write the perturbed weights, x~_t = x_t + rho g_t / ||g_t|| (Algorithm 2, perturbation), into `out`.

    Args:
        params: x_t, left alone.
        ascent_grads: g_t, same shapes.
        rho: radius of the perturbation, in the units of the weights, >= 0.
        norm: ||g_t|| over all parameters, of which these may be a part; a scalar tensor ``()`` on their device costs no
            host-device sync.
        out: receives x~_t, same shapes; may be `ascent_grads`.
    """
    scale = rho / (norm + NORM_GUARD)
    for param, grad, moved in zip(params, ascent_grads, out, strict=True):
        if isinstance(scale, Tensor):
            torch.addcmul(param, grad, scale.to(param.dtype), out=moved)
        else:
            torch.add(param, grad, alpha=scale, out=moved)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm ``()`` over all entries of `tensors`, added up in double precision."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))).double())


@torch.no_grad()
def displacement_dot_(moved: Sequence[Tensor], params: Sequence[Tensor], grad: Tensor, flat: Tensor) -> Tensor:
    """Inner product ``()`` of a displacement and a gradient, <x~_t - x_t, g~_t>, over one bucket.

    Args:
        moved: x~_t; each becomes x~_t - x_t. These tensors are the parts of `flat`.
        params: x_t, same shapes.
        grad: g~_t, ``(n,)``.
        flat: ``(n,)``.
    """
    torch._foreach_sub_(list(moved), list(params))
    return torch.dot(flat, grad)


@torch.no_grad()
def interpolate_(perturbed_grads: Sequence[Tensor], lookahead_grads: Sequence[Tensor], lmbda: float) -> None:
    """Turn `perturbed_grads` into the SAMPa gradient, G_t = (1 - lambda) g~_t + lambda g_{t+1}.

    lambda = 0 leaves g~_t as it is and lambda = 1 gives g_{t+1}, bit for bit. `lookahead_grads` is only read: it is the
    next step's g_t.
    """
    if lmbda != 0.0 and perturbed_grads:
        torch._foreach_lerp_(list(perturbed_grads), list(lookahead_grads), lmbda)
