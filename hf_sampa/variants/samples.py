"""Samples: which samples of B_t the two gradients are taken on."""

from __future__ import annotations

import torch
from torch import Tensor

from .parts import Moment
from .sample_parts import Samples


class Sharded(Samples):
    """Every shard of the batch has a perturbation of its own (mSAM). A shard lies within one micro-batch of one process.

    Args:
        size: of a shard, at least 1; the last of a micro-batch may be smaller.
        count: of the shards of a micro-batch; 0: as many as have that size.
    """

    def __init__(self, size: int, count: int):
        self.size, self.count = size, count

    def shards(self, size: int) -> list[int]:
        if self.count:
            return [len(part) for part in torch.arange(size).tensor_split(min(self.count, size))]
        return [len(part) for part in torch.arange(size).split(self.size)]


class NextBatch(Samples):
    """g_t is the gradient on B_{t+1}, g~_t the one on B_t (SAM-db; a control in Xie et al. 2024, B.2)."""

    next_batch = True


def largest(values: Tensor, count: int) -> Tensor:
    """Whether each of `values` ``(n,)`` is among the `count` largest; the first of equal ones."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[torch.sort(values, descending=True, stable=True).indices[:count]] = True
    return chosen


class LargestLosses(Samples):
    """The k samples with the largest losses (K-SAM, Ni et al. 2022, Algorithm 1).

    Args:
        k: at least 1; all samples where the batch has fewer.
    """

    looks_first = True

    def __init__(self, k: int):
        self.k = k

    def choose(self, losses: Tensor | None, indices: Tensor | None, now: Moment) -> Tensor | None:
        return None if self.k >= len(losses) else largest(losses, self.k)


class LargestRise(Samples):
    """g~_t sees the samples whose loss the perturbation raises most (sharpness-sensitive selection of ESAM, Du et al. 2022a).

    Args:
        gamma: part of the samples, in (0, 1]; 1 is SAM.
    """

    def __init__(self, gamma: float):
        self.gamma = gamma
        self.looks_again = self.reads_losses = gamma < 1

    def narrow(self, before: Tensor, after: Tensor, now: Moment) -> Tensor:
        return largest(after - before, max(1, int(self.gamma * len(before))))


class LargestDifference(Samples):
    """Both gradients see samples drawn by how much a perturbation changed their loss (AUSAM, Deng et al. 2025, Algorithm 1).

    A sample's score is the mean of |loss at x~_t - loss at x_t| over the steps that saw it, 1 before the first. int(alpha n)
    samples are drawn without replacement with probabilities proportional to the scores, mapped from the batch's range to
    [low, high_t], high_t growing from `low` to `high`. In the first epoch all samples are seen.

    Args:
        alpha: part of the samples, in (0, 1]; 1 is SAM.
        low, high: range of the weights; 0 < low <= high.
        growth: part of the run in which high_t grows, in [0, 1].
    """

    reads_indices = True
    reads_losses = True
    state = ("totals", "counts")

    def __init__(self, alpha: float, low: float, high: float, growth: float):
        self.alpha, self.low, self.high, self.growth = alpha, low, high, growth
        self.totals: Tensor | None = None
        self.counts: Tensor | None = None

    def choose(self, losses: Tensor | None, indices: Tensor | None, now: Moment) -> Tensor | None:
        if self.totals is None:
            self.totals = torch.zeros(now.num_samples, dtype=torch.float64)
            self.counts = torch.zeros(now.num_samples, dtype=torch.float64)
        count = max(1, int(self.alpha * len(indices)))
        if now.epoch == 0 or count == len(indices):
            return None
        order = indices.argsort()  # which process read a sample must not matter
        scores = torch.where(self.counts > 0, self.totals / self.counts.clamp(min=1), 1.0)[indices[order]]
        spread = scores.max() - scores.min()
        part = min(1.0, now.step / max(1.0, self.growth * now.max_steps))
        high = self.low + part * (self.high - self.low)
        weights = self.low + (high - self.low) * ((scores - scores.min()) / spread if spread > 0 else 0.0 * scores)
        chosen = torch.zeros(len(indices), dtype=torch.bool)
        chosen[order[torch.multinomial(weights, count, generator=now.generator("samples"))]] = True
        return chosen

    def observe(self, indices: Tensor | None, before: Tensor, after: Tensor, now: Moment) -> None:
        change = (after - before).abs().double()
        known = change.isfinite()  # a step with a bad gradient is skipped, and must not leave traces
        self.totals.index_add_(0, indices[known], change[known])
        self.counts.index_add_(0, indices[known], torch.ones_like(change[known]))
