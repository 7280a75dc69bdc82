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

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


# Numbers that are copied to double precision at once: on a CPU copies stay in the caches, while a GPU wants few launches.
CPU_PIECE, DEVICE_PIECE = 2**16, 2**23


def real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory as real numbers: a complex number is the pair of its parts, ``(..., 2)``, as it is for torch's optimizers."""
    return [torch.view_as_real(each) if each.is_complex() else each for each in tensors]


def ratio(part: float | Tensor, whole: float | Tensor) -> float | Tensor:
    """part / whole, and 0 where `whole` is 0: what has no length has no direction. Costs no host-device sync."""
    if isinstance(whole, Tensor):
        return torch.where(whole == 0, 0.0, part / whole)
    return part / whole if whole else 0.0 * part


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
    scale = ratio(rho, norm)
    scales = {dtype: _within(dtype, scale) for dtype in {param.dtype for param in params}}
    for param, grad, moved in zip(params, ascent_grads, out, strict=True):
        if isinstance(scale, Tensor):
            torch.addcmul(param, grad, scales[param.dtype], out=moved)
        else:
            torch.add(param, grad, alpha=scales[param.dtype], out=moved)


def _within(dtype: torch.dtype, scale: float | Tensor) -> float | Tensor:
    """What `scale` is in `dtype`: rho / norm would be beyond the range of numbers of which a gradient is at its lower end."""
    most = torch.finfo(dtype).max
    return scale.clamp(max=most).to(dtype) if isinstance(scale, Tensor) else min(scale, most)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms ``(n,)`` of each of `tensors`, in double precision.

    Squares leave the range of single precision long before the numbers do: at norms of 1e19, and below 1e-12 they lose digits.
    """
    tensors = real(tensors)
    return _norms_on_cpu(tensors) if tensors[0].device.type == "cpu" else _norms_on_device(tensors)


def _norms_on_device(tensors: list[Tensor]) -> Tensor:
    """Added up in double precision: to look whether single precision is enough would make the host wait."""
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64))


def _norms_on_cpu(tensors: list[Tensor]) -> Tensor:
    """In single precision, which takes a fifth of the time, and once more where that is not enough."""
    found = torch.stack(torch._foreach_norm(tensors)).double()
    few_digits = torch.tensor([_few_digits(each.dtype) for each in tensors], dtype=torch.float64)
    for i in ((found < few_digits) | found.isinf()).nonzero().flatten().tolist():
        found[i] = _norm_in_any_range(tensors[i])
    return found


@functools.cache
def _few_digits(dtype: torch.dtype) -> float:
    """Norms below it are of numbers whose squares may be below the normal ones."""
    return torch.finfo(dtype).tiny ** 0.5 / torch.finfo(dtype).eps


def _norm_in_any_range(tensor: Tensor) -> Tensor:
    largest = max(map(abs, torch.stack(tensor.aminmax()).tolist())) if tensor.numel() else 0.0
    if not 0 < largest < math.inf:
        return torch.tensor(largest, dtype=torch.float64)
    return largest * torch.linalg.vector_norm(tensor / largest).double()


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm ``()`` over all entries of `tensors`, added up in double precision."""
    return norms([norms(tensors)])[0]


def inner(left: Sequence[Tensor], right: Sequence[Tensor], lengths: tuple[float, float]) -> Tensor:
    """Inner products ``(n,)`` of each of `left` with its one of `right`, in double precision; of real numbers.

    lengths: norms over all of `left` and of `right`, or about that, which keep products within the range of single precision.
    """
    # Powers of two, which round nothing. Those of numbers below the normal ones would themselves be out of range.
    one, other = (2.0 ** -max(math.frexp(norm)[1], -126) for norm in lengths)
    return (
        torch.stack([torch.sum((a * one) * (b * other)).double() for a, b in zip(left, right, strict=True)])
        / one
        / other
    )


@torch.no_grad()
def wide_inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner product ``()`` of two ``(n,)``, each product and the sum in double precision, a piece at a time."""
    size = CPU_PIECE if left.is_cpu else DEVICE_PIECE
    pieces = zip(left.split(size), right.split(size), strict=True)
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in pieces]).sum()


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
