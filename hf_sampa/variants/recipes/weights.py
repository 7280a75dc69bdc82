"""The variants that differ in perturbation, mask, schedule or mixing: each paper's method as a recipe, with its defaults."""

from __future__ import annotations

from typing import Annotated

from .. import directions, masks, mixing, psf, schedules
from ..catalogue import (
    NO_ASCENT,
    ONE_BATCH,
    SKIPS,
    AboveZero,
    Count,
    Fraction,
    NonNegative,
    OneOf,
    Real,
    Within,
    variant,
)
from ..recipe import Recipe


@variant(
    source="Foret et al. 2021, arXiv 2010.01412; SAMPa: Xie et al. 2024, arXiv 2410.10683", passes="2", memory="0"
)
def sam() -> Recipe:
    """SAM, and SAMPa-lambda where the timing is parallel."""
    return Recipe()


@variant(
    source="Xie et al. 2024, arXiv 2410.10683",
    passes="2",
    memory="0",
    lmbda=0.0,
    method="sampa",
    why="it is a case of SAMPa",
)
def sampa_0() -> Recipe:
    """SAMPa-0: G_t is g~_t alone."""
    return Recipe()


@variant(
    source="Xie et al. 2024, arXiv 2410.10683, B.3",
    passes="2",
    memory="0",
    lmbda=1.0,
    method="sampa",
    why="it is a case of SAMPa",
)
def optgd() -> Recipe:
    """Optimistic gradient descent: G_t is g_{t+1} alone; a control."""
    return Recipe()


@variant(source="Xie et al. 2024, arXiv 2410.10683, 2.2", passes="1", memory="1", method="sam", why=NO_ASCENT)
def optsam() -> Recipe:
    """OptSAM: the perturbation is made of the g~ of the step before; a control."""
    return Recipe(direction=directions.Previous())


@variant(source="Xie et al. 2024, arXiv 2410.10683, 2.2", passes="1", memory="0", method="sam", why=NO_ASCENT)
def randsam() -> Recipe:
    """RandSAM: the perturbation is random; a control."""
    return Recipe(direction=directions.Random())


@variant(source="Zhao et al. 2022a, arXiv 2202.03599", passes="2", memory="1")
def gnp(alpha: Fraction = 0.8) -> Recipe:
    """Gradient-norm penalty: g_t and g~_t of one batch are mixed."""
    return Recipe(mixing=mixing.Penalty(alpha))


@variant(source="Kwon et al. 2021, arXiv 2102.11600", passes="2", memory="0", rho=0.5)
def asam(eta: NonNegative = 0.01) -> Recipe:
    """ASAM: the perturbation of a weight is as large as the weight allows.

    Weights are the parameters whose names contain "weight", as in the official code; the others are perturbed as by SAM.
    """
    return Recipe(direction=directions.Adaptive(eta))


@variant(source="Li and Giannakis 2023, arXiv 2309.15639", passes="2", memory="1")
def vasso(theta: AboveZero = 0.4) -> Recipe:
    """VaSSO: the perturbation follows a running mean of g_t."""
    return Recipe(direction=directions.Smoothed(theta))


@variant(source="Li et al. 2024, arXiv 2403.12350", passes="2", memory="1")
def fsam(sigma: Real = 1.0, lam: Annotated[float, Within(0, 1, open_high=True)] = 0.9) -> Recipe:
    """Friendly SAM: the perturbation leaves out the running mean of g_t.

    The mean is that of the steps before, as in the official code; with g_t in it, the direction is the same for sigma = 1.
    """
    return Recipe(direction=directions.Friendly(sigma, lam))


@variant(source="Mueller et al. 2023, arXiv 2306.04226", passes="2", memory="0", rho=0.5)
def sam_on() -> Recipe:
    """SAM-ON: only normalization layers are perturbed."""
    return Recipe(mask=masks.NormLayersOnly())


@variant(source="Mi et al. 2022, arXiv 2210.05177 (SSAM-D)", passes="2", memory="1/4")
def ssam_d(
    sparsity: Annotated[float, Within(0, 1, open_high=True)] = 0.5, every: Count = 100, drop: Fraction = 0.5
) -> Recipe:
    """Sparse SAM, dynamic: a part of the entries is perturbed, exchanged from time to time."""
    return Recipe(mask=masks.Dynamic(sparsity, every, drop))


@variant(source="Mi et al. 2022, arXiv 2210.05177 (SSAM-F)", passes="2, and single samples now and then", memory="1/4")
def ssam_f(
    sparsity: Annotated[float, Within(0, 1, open_high=True)] = 0.5, every: Count = 100, fisher_samples: Count = 16
) -> Recipe:
    """Sparse SAM, Fisher: the entries with the largest Fisher information are perturbed, chosen from time to time."""
    return Recipe(mask=masks.Important(sparsity, every, fisher_samples))


@variant(
    source="SL-SAM 2026, arXiv 2602.09395", passes="2, partial", memory="0", rho=0.01, method="sam", why=ONE_BATCH
)
def slsam(s: AboveZero = 0.5, a: NonNegative = 1e-3) -> Recipe:
    """SL-SAM: a random part of the tensors has both gradients and the update."""
    return Recipe(mask=masks.ImportantTensors(s, a))


@variant(source="Liu et al. 2022, arXiv 2203.02714", passes="1 + 1/k", memory="2", rho=0.1, method="sam", why=SKIPS)
def looksam(k: Count = 5, alpha: NonNegative = 0.7) -> Recipe:
    """LookSAM: every k-th step ascends; the others reuse the part of g~ that is orthogonal to g."""
    return Recipe(when=schedules.Periodic(k), mixing=mixing.Orthogonal(alpha))


@variant(source="Jiang et al. 2023, arXiv 2304.14647", passes="1 to 2", memory="0", rho=0.2, method="sam", why=SKIPS)
def aesam(delta: Annotated[float, Within(0, 1, open_high=True)] = 0.9, lam1: Real = -1.0, lam2: Real = 1.0) -> Recipe:
    """AE-SAM: steps with a large gradient ascend."""
    return Recipe(when=schedules.LargeGradient(delta, lam1, lam2))


@variant(
    source="Zhao et al. 2022b, arXiv 2203.09962",
    passes="1 + the mean of p",
    memory="0; 1 with gamma < 1",
    method="sam",
    why=SKIPS,
)
def rst(
    p: Fraction = 0.5,
    gamma: Fraction = 1.0,
    schedule: Annotated[str, OneOf(tuple(schedules.PROBABILITIES))] = "constant",
) -> Recipe:
    """RST: each step ascends with a probability; G-RST with gamma < 1, G_t = (1 - gamma) g_t + gamma g~_t."""
    mix = mixing.Penalty(gamma) if gamma < 1 else None
    return Recipe(when=schedules.Bernoulli(p, schedule), mixing=mix)


@variant(source="Deng et al. 2024, arXiv 2403.08821", passes="1 + S/K", memory="2", method="sam", why=SKIPS)
def vsam(
    window: Annotated[int, Within(5)] = 50,
    start: Annotated[float, Within(1)] = 1.0,
    most: AboveZero = 0.8,
    a1: NonNegative = 0.13,
    a2: NonNegative = 0.13,
    tensors: Count = 10,
    warmup: Fraction = 0.015,
    beta: Fraction = 0.7,
    max_age: Annotated[int, Within(0)] = 6,
) -> Recipe:
    """vSAM: as many steps ascend as g~ - g changes; the others reuse it, ever less."""
    if start > window:
        raise ValueError(f"variant_args: start of 'vsam' is to be at most its window, {window}, got {start:g}.")
    when = psf.Quota(window, start, most, a1, a2, tensors, warmup)
    return Recipe(when=when, mixing=psf.ReusedPSF(beta, max_age))


@variant(
    source="after Deng and Pang 2025, arXiv 2510.03763; a reconstruction",
    passes="1 + sampled part",
    memory="2",
    method="sam",
    why=SKIPS,
)
def arsam(
    sampler: Annotated[str, OneOf(("quota", "periodic", "bernoulli"))] = "quota",
    k: Count = 5,
    p: Fraction = 0.5,
    beta: Fraction = 0.7,
    max_age: Annotated[int, Within(0)] = 6,
) -> Recipe:
    """ARSAM, reconstructed from its abstract: g~ - g is sampled adaptively, reused, and mixed with the fresh gradient.

    Its code and its rules are not public. Here the sampling is vSAM's with its published settings ("quota"), every k-th step
    ("periodic") or random ("bernoulli", probability p).
    """
    samplers = {
        "quota": psf.Quota(window=50, start=1.0, most=0.8, a1=0.13, a2=0.13, tensors=10, warmup=0.015),
        "periodic": schedules.Periodic(k),
        "bernoulli": schedules.Bernoulli(p),
    }
    return Recipe(when=samplers[sampler], mixing=psf.ReusedPSF(beta, max_age))


@variant(source="Tan et al. 2024, arXiv 2401.07250", passes="2", memory="0")
def stable_sam(normalized: Annotated[str, OneOf(("no", "yes"))] = "no") -> Recipe:
    """Stable SAM: g~_t is given the length of g_t; by default with eps_t = rho g_t, as in the paper."""
    direction = directions.Unnormalized() if normalized == "no" else None
    return Recipe(direction=direction, mixing=mixing.Rescaled())


@variant(source="Zhuang et al. 2022, arXiv 2203.08065", passes="2", memory="1")
def gsam(alpha: NonNegative = 0.4, low: Fraction = 1.0) -> Recipe:
    """GSAM: descends on the surrogate gap, too; rho may follow the learning rate down to `low` times rho."""
    return Recipe(direction=directions.ScheduledRadius(low), mixing=mixing.SurrogateGap(alpha))


@variant(source="Wang et al. 2026, arXiv 2605.10183", passes="2", memory="0", rho=0.35)
def lesam(floor: NonNegative = 0.001, warmup: Fraction = 0.05, decay: Fraction = 0.2) -> Recipe:
    """LE-SAM: not the radius is fixed, but by how much the loss rises, to first order: `rho`. It follows a schedule."""
    return Recipe(direction=directions.LossBudget(floor, warmup, decay))


@variant(source="Sun et al. 2023, arXiv 2303.00565", passes="2", memory="1", optimizer={"amsgrad": True})
def adasam() -> Recipe:
    """AdaSAM: SAM around AMSGrad, whose second moment never falls; torch's, with bias correction. Needs Adam or AdamW of torch."""
    return Recipe()


@variant(
    source="after Singh et al. 2025, arXiv 2502.02407; of the preconditioning only the abstract was read",
    passes="2",
    memory="0",
    optimizer={"betas": None, "eps": None},
)
def precond_sam() -> Recipe:
    """Preconditioned SAM: the perturbation is g_t by the root of Adam's second moment, of length rho. Needs Adam or AdamW of torch.

    Where Adam has seen no gradient yet, as of a word that is new, this is very large, so that such entries take nearly all of the
    perturbation: begin late, with sampa_start.
    """
    return Recipe(direction=directions.Preconditioned())


@variant(source="Yun 2025, arXiv 2505.02369", passes="2", memory="0")
def zsharp(percentile: Annotated[float, Within(0, 1, open_high=True)] = 0.95) -> Recipe:
    """ZSharp: of each tensor the entries of g_t perturb that are furthest from its mean."""
    return Recipe(direction=directions.ZScores(percentile))


@variant(source="Becker et al. 2024, arXiv 2401.12033", passes="1", memory="1", rho=1.0, method="sam", why=NO_ASCENT)
def momentum_sam(beta: Annotated[float, Within(0, 1, open_high=True)] = 0.9) -> Recipe:
    """Momentum-SAM: the perturbation goes against a running mean of g~. `rho` is the authors' for AdamW."""
    return Recipe(direction=directions.Momentum(beta))
