"""The variants that choose samples or losses: each paper's method as a recipe, with its defaults."""

from __future__ import annotations

from typing import Annotated

from .. import losses, masks, samples, schedules
from ..catalogue import (
    BY_LOSSES,
    NO_ASCENT,
    PAIRED,
    AboveZero,
    Count,
    Fraction,
    NonNegative,
    OneOf,
    Positive,
    Within,
    variant,
)
from ..recipe import Recipe


@variant(
    source="Foret et al. 2021, arXiv 2010.01412; Behdin et al. 2023, arXiv 2302.09693",
    passes="2",
    memory="1; number of shards + 1 in parallel",
)
def msam(size: Count = 32, count: Annotated[int, Within(0)] = 0) -> Recipe:
    """mSAM: every shard of the batch has a perturbation of its own; shards of `size` samples, or, if it is above 0, `count` of a micro-batch."""
    return Recipe(samples=samples.Sharded(size, count))


@variant(source="Xie et al. 2024, arXiv 2410.10683, B.2", passes="2", memory="0", method="sam", why=PAIRED)
def sam_db() -> Recipe:
    """SAM-db: g_t is that of the next batch; a control."""
    return Recipe(samples=samples.NextBatch())


@variant(
    source="Ni et al. 2022, arXiv 2210.12864", passes="F + 2 of k samples", memory="0", method="sam", why=BY_LOSSES
)
def ksam(k: Count = 16) -> Recipe:
    """K-SAM: both gradients see the k samples with the largest losses. The papers' k was not to be found: 16 is a choice."""
    return Recipe(samples=samples.LargestLosses(k))


@variant(
    source="Du et al. 2022a, arXiv 2110.03141",
    passes="1, partial + F + gamma",
    memory="0",
    method="sam",
    why=BY_LOSSES,
)
def esam(beta: AboveZero = 0.5, gamma: AboveZero = 0.5) -> Recipe:
    """ESAM: random tensors are perturbed, and g~_t sees the samples whose losses rose most."""
    return Recipe(mask=masks.RandomTensors(beta), samples=samples.LargestRise(gamma))


@variant(source="Du et al. 2022a, arXiv 2110.03141", passes="2", memory="0")
def esam_swp(beta: AboveZero = 0.5) -> Recipe:
    """ESAM's stochastic weight perturbation alone: random tensors are perturbed."""
    return Recipe(mask=masks.RandomTensors(beta))


@variant(
    source="Deng et al. 2025, arXiv 2406.08001",
    passes="2 of alpha n samples",
    memory="0",
    rho=0.1,
    method="sam",
    why=BY_LOSSES,
)
def ausam(alpha: AboveZero = 0.5, low: AboveZero = 0.1, high: AboveZero = 0.5, growth: Fraction = 0.15) -> Recipe:
    """AUSAM: both gradients see samples drawn by how much a perturbation changes their loss."""
    if low > high:
        raise ValueError(f"variant_args: low of 'ausam' is to be at most high, {high:g}, got {low:g}.")
    return Recipe(samples=samples.LargestDifference(alpha, low, high, growth))


@variant(
    source="Xie et al. 2024b, arXiv 2407.12993",
    passes="2; 3 in parallel with mix=own",
    memory="0; 2 in parallel with mix=own",
)
def bisam(
    mu: Positive = 1.0,
    phi: Annotated[str, OneOf(("log", "tanh"))] = "log",
    alpha: Positive = 0.1,
    mix: Annotated[str, OneOf(("ascent", "own"))] = "ascent",
) -> Recipe:
    """BiSAM: the perturbation ascends on a lower bound of the 0-1 loss.

    In parallel, g_{t+1} serves the look-ahead and the mix as well. The papers leave open of which loss it is there: of the bound
    (mix=ascent, one gradient), or of the trainer's own loss (mix=own, a second gradient of B_{t+1}).
    """
    return Recipe(loss=losses.Bilevel(mu, phi, alpha, separate=mix == "own"))


@variant(
    source="Singh et al. 2025, arXiv 2502.02407",
    passes="2",
    memory="0, and logits",
)
def functional_sam() -> Recipe:
    """Functional SAM: the loss's slope at the logits stays that of x_t, and the model's Jacobian is that of x~_t.

    In parallel the slope is that of y_t, where g_t is taken; it is as large as the logits, and travels with g_t.
    """
    return Recipe(loss=losses.Functional())


@variant(
    source="Du et al. 2022b, arXiv 2205.14083",
    passes="1",
    memory="0, and logits",
    rho=0.0,
    method="sam",
    why=NO_ASCENT,
)
def saf(lam: NonNegative = 0.3, tau: Positive = 5.0, start: Fraction = 0.025, epochs: Count = 3) -> Recipe:
    """SAF: no ascent; the logits are kept near those of some epochs ago."""
    return Recipe(when=schedules.Never(), loss=losses.FromThePast(lam, tau, start, epochs))


@variant(source="Du et al. 2022b, arXiv 2205.14083", passes="1 + F", memory="1", rho=0.0, method="sam", why=NO_ASCENT)
def mesa(lam: NonNegative = 0.8, tau: Positive = 5.0, start: Fraction = 0.025, decay: Fraction = 0.9995) -> Recipe:
    """MESA: no ascent; the logits are kept near those of a running mean of the weights."""
    return Recipe(when=schedules.Never(), loss=losses.FromTheMean(lam, tau, start, decay))
