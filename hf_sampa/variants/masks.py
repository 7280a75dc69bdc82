"""Masks: which parameters, or which of their entries, are perturbed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .parts import Mask, Moment


class NormLayersOnly(Mask):
    """Only normalization layers are perturbed, with the whole radius (SAM-ON, Mueller et al. 2023).

    Found by the name of the module's type, not of the module: LayerNorm, RMSNorm, BatchNorm2d, LlamaRMSNorm and so on.
    """

    def __init__(self):
        self.kept: list[bool] = []

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        in_norms = {
            id(param) for module in model.modules() if is_norm(module) for param in module.parameters(recurse=False)
        }
        self.kept = [id(param) in in_norms for param in params]
        if not any(self.kept):
            raise ValueError(
                "SAM-ON perturbs normalization layers alone, but the model has no trainable parameter in a LayerNorm, "
                "RMSNorm, BatchNorm, GroupNorm or other module of that kind. Unfreeze them, or take another variant."
            )

    def keeps(self, now: Moment) -> Sequence[bool]:
        return self.kept


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, by its type."""
    return re.search(r"Norm([123]d|Gated)?$", type(module).__name__) is not None


class RandomTensors(Mask):
    """Each parameter is perturbed with probability beta, in each step anew (stochastic weight perturbation of ESAM, Du et al.
    2022a). Scaled by 1 / beta. At least one is.

    Args:
        beta: in (0, 1]; 1 is SAM.
    """

    def __init__(self, beta: float):
        self.beta, self.scale = beta, 1 / beta
        self.count = 0

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        self.count = len(params)

    def keeps(self, now: Moment) -> Sequence[bool] | None:
        if self.beta == 1:
            return None
        return draw_some(torch.full((self.count,), self.beta, dtype=torch.float64), now.generator("weights"))


def draw_some(probability: Tensor, generator: torch.Generator) -> list[bool]:
    """Independent draws ``(n,)`` with these probabilities, repeated until there is one at least."""
    while True:
        drawn = torch.rand(probability.shape, generator=generator, dtype=torch.float64) < probability
        if drawn.any():
            return drawn.tolist()


class ImportantTensors(Mask):
    """A random part of the parameters has both gradients and the update, drawn by learned probabilities (SL-SAM, 2026).

    Parameter i is drawn with probability p_i. With u_i = ||g_i||, of those drawn l_i = max_j (u_j / p_j)^2 - (u_i / p_i)^2;
    then p_i <- p_i exp(-a l_i / p_i), scaled to sum to s n, with none above 1.

    Args:
        s: expected part of the parameters that are drawn, in (0, 1]; 1 is SAM.
        a: rate at which probabilities follow the norms, at least 0.
    """

    descent = on_shards = True
    state = ("p",)

    def __init__(self, s: float, a: float):
        self.s, self.a = s, a
        self.p: Tensor | None = None

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        self.p = torch.full((len(params),), self.s, dtype=torch.float64)

    def keeps(self, now: Moment) -> Sequence[bool] | None:
        return None if self.s == 1 else draw_some(self.p, now.generator("active tensors"))

    def observe(self, g: Sequence[Tensor], now: Moment) -> None:
        if self.s == 1:
            return
        active = torch.tensor(self.keeps(now))
        u = now.norms(g).cpu()
        raised = torch.where(active, (u / self.p) ** 2, 0.0)
        loss = torch.where(active, raised.max() - raised, 0.0)
        self.p = capped(torch.where(active, self.p * torch.exp(-self.a * loss / self.p), self.p), self.s * len(self.p))


def capped(weights: Tensor, total: float) -> Tensor:
    """`weights` ``(n,)`` scaled to sum to `total` <= n, with none above 1 and none below 1e-8."""
    full = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        rest = weights[~full].sum()
        scale = (total - full.sum()) / rest if rest > 0 else torch.zeros(())
        over = ~full & (weights * scale > 1)
        if not over.any():
            return torch.where(full, 1.0, weights * scale).clamp(1e-8, 1.0)
        full |= over


class Sparse(Mask):
    """A part of the entries is perturbed, the radius being that of all (Sparse SAM, Mi et al. 2022): ||eps_t|| <= rho.

    Args:
        sparsity: part of the entries that is left alone, in [0, 1); 0 is SAM.
        every: steps between two choices.
    """

    state = ("mask",)

    def __init__(self, sparsity: float, every: int):
        self.sparsity, self.every = sparsity, every
        self.mask: list[Tensor] | None = None

    def thin(self, direction: list[Tensor], now: Moment) -> bool:
        if self.sparsity == 0:
            return False
        if self.mask is None:
            self.mask = self._first(direction, now)
        elif now.step % self.every == 0:
            self.mask = self._next(direction, now)
        for each, mask in zip(direction, self.mask, strict=True):
            each.mul_(mask)
        return True

    def _first(self, g: list[Tensor], now: Moment) -> list[Tensor]:
        return self._next(g, now)

    def _next(self, g: list[Tensor], now: Moment) -> list[Tensor]:
        raise NotImplementedError


class Dynamic(Sparse):
    """SSAM-D: the entries with the smallest gradients are dropped and as many others take their place, drawn at random.

    Args:
        drop: part of the perturbed entries that is exchanged, falling with a cosine to 0 at the end of the run; in [0, 1].
    """

    def __init__(self, sparsity: float, every: int, drop: float):
        super().__init__(sparsity, every)
        self.drop = drop

    def _first(self, g: list[Tensor], now: Moment) -> list[Tensor]:
        scores = draws_like(g, now)
        return split_like(top(scores, round((1 - self.sparsity) * scores.numel())), g)

    def _next(self, g: list[Tensor], now: Moment) -> list[Tensor]:
        live = torch.cat([mask.reshape(-1) for mask in self.mask])
        rate = self.drop / 2 * (1 + math.cos(math.pi * now.step / max(1, now.max_steps)))
        count = min(int(rate * int(live.sum())), int((~live).sum()))
        magnitude = torch.cat([each.abs().reshape(-1) for each in g])
        kept = top(torch.where(live, magnitude, -1.0), int(live.sum()) - count)
        grown = top(torch.where(live, -1.0, draws_like(g, now)), count)
        return split_like(kept | grown, g)


class Important(Sparse):
    """SSAM-F: the entries with the largest empirical Fisher information are perturbed, chosen anew every so many steps.

    Fisher information is the sum of squared gradients of single samples (in evaluation mode, so that running statistics and
    dropout have no part in it). The official code leaves its first step unperturbed; here the first choice comes before it.

    Args:
        fisher_samples: how many samples are drawn, at least 1.
    """

    def __init__(self, sparsity: float, every: int, fisher_samples: int):
        super().__init__(sparsity, every)
        self.fisher_samples = fisher_samples if sparsity else 0

    def wants_fisher(self, now: Moment) -> bool:
        return bool(self.sparsity) and (self.mask is None or now.step % self.every == 0)

    def learn(self, fisher: list[Tensor], now: Moment) -> None:
        scores = torch.cat([each.reshape(-1) for each in fisher])
        self.mask = split_like(top(scores, round((1 - self.sparsity) * scores.numel())), fisher)

    def _next(self, g: list[Tensor], now: Moment) -> list[Tensor]:
        return self.mask


def draws_like(tensors: Sequence[Tensor], now: Moment) -> Tensor:
    """Uniform draws ``(d,)``, one per entry of all `tensors`."""
    device = tensors[0].device
    generator = now.generator("sparse mask", device)
    return torch.rand(sum(each.numel() for each in tensors), generator=generator, device=device)


def top(scores: Tensor, count: int) -> Tensor:
    """Whether each of `scores` ``(d,)`` is among the `count` largest; the first of equal ones."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return chosen


def split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`flat` ``(d,)`` in the shapes of `tensors`."""
    parts = flat.split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]
