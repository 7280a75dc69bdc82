"""The parts of a recipe that see single samples; see `hf_sampa.variants.parts` for what a part is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .parts import Moment, Part


class Samples(Part):
    """Both gradients are those of all samples of B_t.

    Choices are per sample of the whole update batch, over its micro-batches and replicas.

    Attributes:
        next_batch: whether g_t is that of B_{t+1} instead.
        looks_first: whether `choose` needs losses, for which all samples go forward once more.
        looks_again: whether `narrow` chooses, for which all samples go forward once more, at x~_t.
        reads_losses: whether per-sample losses are needed at all.
        reads_indices: whether the samples' places in the dataset are needed.
    """

    next_batch: ClassVar[bool] = False
    looks_first: ClassVar[bool] = False
    looks_again: ClassVar[bool] = False
    reads_losses: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False

    @property
    def sharded(self) -> bool:
        """Whether shards of the batch have perturbations of their own; then `shards` says which."""
        return type(self).shards is not Samples.shards

    @property
    def selects(self) -> bool:
        """Whether the two gradients may see other samples than all those of B_t."""
        return self.next_batch or self.looks_first or self.looks_again or self.reads_losses or self.reads_indices

    def shards(self, size: int) -> Sequence[int]:
        """Sizes of the shards of a micro-batch of `size` samples."""
        raise NotImplementedError

    def choose(self, losses: Tensor | None, indices: Tensor | None, now: Moment) -> Tensor | None:
        """Which samples both gradients see.

        Args:
            losses: ``(n,)`` at x_t, with `looks_first`.
            indices: ``(n,)`` places in the dataset, with `reads_indices`.
            now: the step.

        Returns:
            ``(n,)`` bool, at least one of them True; None for all.
        """
        return None

    def narrow(self, before: Tensor, after: Tensor, now: Moment) -> Tensor:
        """Which of these samples g~_t sees, ``(n,)`` bool, given their losses at x_t and at x~_t, ``(n,)``."""
        raise NotImplementedError

    def observe(self, indices: Tensor | None, before: Tensor, after: Tensor, now: Moment) -> None:
        """See the losses of the samples of both gradients, ``(n,)``, at x_t and at x~_t, with `reads_losses`."""


@dataclass(frozen=True)
class Seen:
    """What a loss may be made of, for the samples of one micro-batch.

    Attributes:
        logits: ``(n, classes)``.
        labels: ``(n,)``, classes.
        ascent: whether the gradient is g_t rather than g~_t.
        teacher: ``(n, classes)``, logits that the loss asked for; None where there are none yet.
    """

    logits: Tensor
    labels: Tensor
    ascent: bool
    teacher: Tensor | None = None


class Loss(Part):
    """The trainer's own loss.

    Attributes:
        reads_logits: whether the call needs logits and labels; without, it is not made.
        keeps_slope: whether backward of g~_t's pass goes on from the logits with the derivative of the trainer's loss that g_t's had there.
        reads_indices: whether `recall` and `record` are to be called, with the samples' places in the dataset.
        separate: whether, in SAMPa's timing, the look-ahead and the mix are to have a gradient of B_{t+1} that is not the ascent's.
        teacher_decay: of a running mean of the weights, whose logits (in evaluation mode) are `Seen.teacher`; None: of none.
    """

    reads_logits: ClassVar[bool] = False
    keeps_slope: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False
    separate: bool = False
    teacher_decay: float | None = None

    def __call__(self, loss: Tensor, seen: Seen, now: Moment) -> Tensor:
        """The loss ``()`` to take the gradient of, given the trainer's own, a mean over the samples."""
        return loss

    def recall(self, indices: Tensor, now: Moment) -> Tensor | None:
        """Teacher logits ``(n, classes)`` of these samples ``(n,)``; None where there are none yet."""
        return None

    def record(self, indices: Tensor, logits: Tensor, now: Moment) -> None:
        """See the logits ``(n, classes)`` of these samples ``(n,)``."""
