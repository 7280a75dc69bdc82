"""The variants: each paper's method as a recipe, with its defaults."""

from __future__ import annotations

from typing import Annotated

from ..recipe import Recipe
from . import directions, losses, masks, mixing, psf, samples, schedules
from .catalogue import AboveZero, Count, NonNegative, OneOf, Part, Positive, Real, Within, variant


# Why a variant has one timing only.
SKIPS = "a pair takes both gradients at once in every step, so that leaving one out saves no time"
NO_ASCENT = "it has no ascent gradient that a second process could take"
ONE_BATCH = "both of its gradients must be those of the same tensors, but g_{t+1} is of others"
PAIRED = "SAMPa's two gradients of one batch are what it must not have"
BY_LOSSES = "its choice of samples rests on losses that one process of a pair would have to wait for the other to tell"


@variant(
    source="Foret et al. 2021, arXiv 2010.01412; SAMPa: Xie et al. 2024, arXiv 2410.10683", passes="2", memory="0"
)
def sam() -> Recipe:
    """SAM, and SAMPa-lambda where the timing is parallel."""
    return Recipe()


@variant(
    source="Xie et al. 2024, arXiv 2410.10683", passes="2", memory="0", lmbda=0.0, method="sampa", why="it is one"
)
def sampa_0() -> Recipe:
    """SAMPa-0: G_t is g~_t alone."""
    return Recipe()


@variant(
    source="Xie et al. 2024, arXiv 2410.10683, B.3", passes="2", memory="0", lmbda=1.0, method="sampa", why="it is one"
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
def gnp(alpha: Part = 0.8) -> Recipe:
    """Gradient-norm penalty: g_t and g~_t of one batch are mixed."""
    return Recipe(mixing=mixing.Penalty(alpha))


@variant(source="Kwon et al. 2021, arXiv 2102.11600", passes="2", memory="0", rho=0.5)
def asam(eta: NonNegative = 0.01) -> Recipe:
    """ASAM: the perturbation of a weight is as large as the weight allows."""
    return Recipe(direction=directions.Adaptive(eta))


@variant(source="Li and Giannakis 2023, arXiv 2309.15639", passes="2", memory="1")
def vasso(theta: AboveZero = 0.4) -> Recipe:
    """VaSSO: the perturbation follows a running mean of g_t."""
    return Recipe(direction=directions.Smoothed(theta))


@variant(source="Li et al. 2024, arXiv 2403.12350", passes="2", memory="1")
def fsam(sigma: Real = 1.0, lam: Annotated[float, Within(0, 1, open_high=True)] = 0.9) -> Recipe:
    """Friendly SAM: the perturbation leaves out the running mean of g_t."""
    return Recipe(direction=directions.Friendly(sigma, lam))


@variant(source="Mueller et al. 2023, arXiv 2306.04226", passes="2", memory="0", rho=0.5)
def sam_on() -> Recipe:
    """SAM-ON: only normalization layers are perturbed."""
    return Recipe(mask=masks.NormLayersOnly())


@variant(source="Mi et al. 2022, arXiv 2210.05177 (SSAM-D)", passes="2", memory="1/4")
def ssam_d(
    sparsity: Annotated[float, Within(0, 1, open_high=True)] = 0.5, every: Count = 100, drop: Part = 0.5
) -> Recipe:
    """Sparse SAM, dynamic: a part of the entries is perturbed, exchanged from time to time."""
    return Recipe(mask=masks.Dynamic(sparsity, every, drop))


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
    source="Zhao et al. 2022b, arXiv 2203.09962", passes="1 + p", memory="0; 1 with gamma < 1", method="sam", why=SKIPS
)
def rst(
    p: Part = 0.5,
    gamma: Part = 1.0,
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
    warmup: Part = 0.015,
    beta: Part = 0.7,
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
    p: Part = 0.5,
    beta: Part = 0.7,
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
def gsam(alpha: NonNegative = 0.4, low: Part = 1.0) -> Recipe:
    """GSAM: descends on the surrogate gap, too; rho may follow the learning rate down to `low` times rho."""
    return Recipe(direction=directions.ScheduledRadius(low), mixing=mixing.SurrogateGap(alpha))


@variant(
    source="Foret et al. 2021, arXiv 2010.01412; Behdin et al. 2023, arXiv 2302.09693",
    passes="2",
    memory="1; number of shards in parallel",
)
def msam(size: Count = 32, count: Annotated[int, Within(0)] = 0) -> Recipe:
    """mSAM: every shard of the batch has a perturbation of its own; shards of `size` samples, or `count` of a micro-batch."""
    return Recipe(samples=samples.Sharded(size, count))


@variant(source="Xie et al. 2024, arXiv 2410.10683, B.2", passes="2", memory="0", method="sam", why=PAIRED)
def sam_db() -> Recipe:
    """SAM-db: g_t is that of the next batch; a control."""
    return Recipe(samples=samples.NextBatch())


@variant(
    source="Ni et al. 2022, arXiv 2210.12864", passes="F + 2 of k samples", memory="0", method="sam", why=BY_LOSSES
)
def ksam(k: Count = 16) -> Recipe:
    """K-SAM: both gradients see the k samples with the largest losses."""
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
def ausam(alpha: AboveZero = 0.5, low: AboveZero = 0.1, high: AboveZero = 0.5, growth: Part = 0.15) -> Recipe:
    """AUSAM: both gradients see samples drawn by how much a perturbation changes their loss."""
    if low > high:
        raise ValueError(f"variant_args: low of 'ausam' is to be at most high, {high:g}, got {low:g}.")
    return Recipe(samples=samples.LargestDifference(alpha, low, high, growth))


@variant(source="Xie et al. 2024b, arXiv 2407.12993", passes="2", memory="0")
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


@variant(source="Du et al. 2022b, arXiv 2205.14083", passes="1", memory="0, and logits", method="sam", why=NO_ASCENT)
def saf(lam: NonNegative = 0.3, tau: Positive = 5.0, start: Part = 0.025, epochs: Count = 3) -> Recipe:
    """SAF: no ascent; the logits are kept near those of some epochs ago."""
    return Recipe(when=schedules.Never(), loss=losses.FromThePast(lam, tau, start, epochs))


@variant(source="Du et al. 2022b, arXiv 2205.14083", passes="1 + F", memory="1", method="sam", why=NO_ASCENT)
def mesa(lam: NonNegative = 0.8, tau: Positive = 5.0, start: Part = 0.025, decay: Part = 0.9995) -> Recipe:
    """MESA: no ascent; the logits are kept near those of a running mean of the weights."""
    return Recipe(when=schedules.Never(), loss=losses.FromTheMean(lam, tau, start, decay))


@variant(source="Sun et al. 2023, arXiv 2303.00565", passes="2", memory="1", optimizer={"amsgrad": True})
def adasam() -> Recipe:
    """AdaSAM: SAM around AMSGrad, whose second moment never falls. Needs --optim adamw_torch."""
    return Recipe()
