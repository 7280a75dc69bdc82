"""The variants for models with LoRA adapters: each paper's method as a recipe, with its defaults."""

from __future__ import annotations

from .. import adapters, schedules
from ..catalogue import ONE_GRADIENT, Count, variant
from ..recipe import Recipe


@variant(source="Li et al. 2025, arXiv 2409.14396", passes="1", memory="0", method="sam", why=ONE_GRADIENT)
def flat_lora() -> Recipe:
    """Flat-LoRA: the merged weights are perturbed at random, each row in proportion to its length.

    For models with LoRA adapters. The strength grows from 0 to `rho`, at the end of the run: 0.05 in the paper for texts, 0.15 for images.
    """
    return Recipe(when=schedules.Never(), adapters=adapters.RandomMergedWeights())


@variant(
    source="Liu et al. 2025, arXiv 2508.19564",
    passes="1",
    memory="4 per auxiliary weight",
    method="sam",
    why=ONE_GRADIENT,
)
def bi_lora(rank: Count = 8) -> Recipe:
    """Bi-LoRA: beside each adapter an auxiliary one ascends, whose products are at most `rho` long; it is no part of what is saved.

    For models with LoRA adapters.
    """
    return Recipe(when=schedules.Never(), adapters=adapters.Adversary(rank))
