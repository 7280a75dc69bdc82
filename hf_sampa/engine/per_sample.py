"""Single samples of an update batch: their logits, losses and places in the dataset, and batches of some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from ..data import MicroBatch, UpdateBatch
from ..distributed import Exchange
from ..variants import Loss, Moment, Seen


class SampleView:
    """What a recipe may see of single samples, over the micro-batches and replicas of an update batch.

    All tensors that it gives hold all samples of the update batch, in the same order on every process.

    Args:
        exchange: connects the replicas.
        forward: runs a micro-batch forward without gradients, after which its `logits` are set; the flag says whether in
            evaluation mode.
        weigh: sets the shares of an update batch's micro-batches.
        loss_at: the loss ``()`` of one sample of the dataset, given its place and the `Moment`, in evaluation mode.

    Attributes:
        in_step: whether all processes run as many micro-batches, as a sharded model needs, those without a sample, too.
    """

    in_step = False

    def __init__(
        self,
        exchange: Exchange,
        forward: Callable[[MicroBatch, bool], None],
        weigh: Callable[[UpdateBatch], None],
        loss_at: Callable[[int, Moment], Tensor],
    ):
        self.exchange, self.forward, self.weigh, self.loss_at = exchange, forward, weigh, loss_at

    def look(self, batch: UpdateBatch, evaluating: bool = False) -> None:
        """Run all samples forward, without gradients."""
        for micro_batch in batch:
            self.forward(micro_batch, evaluating)

    def losses(self, batch: UpdateBatch) -> Tensor:
        """Cross entropies ``(n,)`` of the logits that were seen last, on the CPU."""
        own = [
            F.cross_entropy(each.logits.float(), each.inputs["labels"].to(each.logits.device), reduction="none")
            for each in batch
            if each.logits is not None
        ]
        return self._of_all(torch.cat(own) if own else torch.zeros(0))

    def indices(self, batch: UpdateBatch) -> Tensor:
        """Places in the dataset ``(n,)``."""
        return self._of_all(torch.cat([each.indices for each in batch]))

    def logits(self, batch: UpdateBatch) -> Tensor:
        """Logits that were seen last, ``(n, classes)``, on the CPU."""
        return self._of_all(torch.cat([each.logits for each in batch]))

    def narrowed(self, batch: UpdateBatch, chosen: Tensor) -> UpdateBatch:
        """The samples of `batch` that `chosen` ``(n,)`` says, weighed anew; a process may be left with none."""
        sizes = [each.size for each in batch]
        before = int(self._of_all(torch.tensor([sum(sizes)]))[: self.exchange.mesh.replica].sum())
        own = chosen[before : before + sum(sizes)].split(sizes)
        parts = [each.narrowed(which) for each, which in zip(batch, own, strict=True)]
        if not self.in_step:
            parts = [each for each in parts if each.size] or parts[:1]
        batch = replace(batch, micro_batches=parts)
        self.weigh(batch)
        return batch

    def shards(
        self, batch: UpdateBatch, sizes: Callable[[int], Sequence[int]]
    ) -> list[tuple[UpdateBatch, float | Tensor]]:
        """This process's shards of `batch`, each within one micro-batch, and their weights in its mean.

        Args:
            batch: B_t.
            sizes: of the shards of a micro-batch of so many samples.
        """
        pieces = []
        for each in batch:
            places = torch.arange(each.size).split(list(sizes(each.size)))
            several = len(places) > 1  # which then draw random numbers of their own
            pieces += [
                each.narrowed(torch.isin(torch.arange(each.size), own), j if several else None)
                for j, own in enumerate(places)
            ]
        self.weigh(replace(batch, micro_batches=pieces))
        shards = []
        for piece in pieces:
            weight, piece.share = piece.share, 1.0 if isinstance(piece.share, Tensor) or piece.share else 0.0
            shards.append((replace(batch, micro_batches=[piece]), weight))
        return shards

    def halves(self, batch: UpdateBatch) -> tuple[UpdateBatch, UpdateBatch]:
        """`batch` in two, whose weights add up to its own: half of its micro-batches each, and of an odd one half of its samples.

        A micro-batch without halves is in the first one, and a half of nothing has a micro-batch of weight 0.
        """
        whole = [replace(each, num_items=None, share=None) for each in batch]
        middle = len(whole) // 2
        first, second = whole[:middle], whole[middle : 2 * middle]
        if len(whole) % 2:
            (*_, last) = whole
            if last.halves is None:
                first = [*first, last]
            else:  # with random numbers of their own
                one, other = (
                    replace(last, inputs=half, position=(last.position, j)) for j, half in enumerate(last.halves)
                )
                first, second = [*first, one], [*second, other]
        self.weigh(replace(batch, micro_batches=[*first, *second]))
        if not second or (self.in_step and len(second) < len(first)):
            second = [*second, replace(first[-1], share=0.0)]
        return replace(batch, micro_batches=first), replace(batch, micro_batches=second)

    def _of_all(self, own: Tensor) -> Tensor:
        return self.exchange.concatenate(own.detach()).cpu()


def check_classes(logits: Any, labels: Any) -> None:
    """Raise ValueError where `logits` are not those of one class per sample."""
    fits = (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.ndim == 2
        and logits.shape[1] > 1
        and labels.ndim == 1
        and not labels.is_floating_point()
    )
    if not fits:
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (logits, labels)]
        raise ValueError(
            "variant: expected a model that sorts each sample into one of several classes, with logits of shape (samples, "
            f"classes) and whole labels of shape (samples,), because the variant needs the loss of single samples; got "
            f"logits {shapes[0]} and labels {shapes[1]} (of the batch's key 'labels'). Take a variant without per-sample losses."
        )


def logits_of(outputs: Any) -> Any:
    """What a model's outputs, a dict or a tuple that may begin with the loss, hold as logits; None where they hold none."""
    if isinstance(outputs, dict):
        return outputs.get("logits")
    after_loss = [each for each in outputs if not (isinstance(each, Tensor) and each.ndim == 0)]
    return after_loss[0] if after_loss else None


def recipe_loss(part: Loss, loss: Tensor, outputs: Any, micro_batch: MicroBatch, ascent: bool, now: Moment) -> Tensor:
    """What the recipe makes of the trainer's own loss; keeps that and the logits on `micro_batch`."""
    if part.keeps_slope:
        return _with_slope(loss, outputs, micro_batch, ascent)
    logits, labels = logits_of(outputs), micro_batch.inputs.get("labels")
    check_classes(logits, labels)
    micro_batch.logits, micro_batch.loss = logits.detach(), loss.detach()
    labels = labels.to(logits.device)
    teacher = micro_batch.teacher
    if part.reads_indices and (found := part.recall(micro_batch.indices, now)) is not None:
        teacher = found.to(logits.device)
    return part(loss, Seen(logits, labels, ascent, teacher), now)


SCALE = 1024.0  # of slopes while they are found, which in half precision may be too small; a power of two, which rounds nothing


def _with_slope(loss: Tensor, outputs: Any, micro_batch: MicroBatch, ascent: bool) -> Tensor:
    """Keep how `loss` depends on the logits, in the pass for g_t; let the backward of the pass for g~_t go on from there with that."""
    logits = logits_of(outputs)
    edge = _as_computed(logits) if isinstance(logits, Tensor) and logits.requires_grad else None
    slope = None if edge is None or _has_several(outputs, logits) else _slope(loss, edge)
    if slope is None:
        raise ValueError(
            "variant: expected a loss that is made of the logits that the model returns, because the variant needs its derivative "
            f"with respect to them; got {'logits' if isinstance(logits, Tensor) else type(logits).__name__} that the loss does not "
            "depend on, or several tensors that might be logits. Let the model's outputs have the logits that its loss is computed from, under that "
            "name, or take another variant."
        )
    if micro_batch.logits is not None:
        raise ValueError(
            "variant: expected one call of super().compute_loss() in a pass, because the variant keeps the slope of one loss, got two. Put what "
            "calls it into a Trainer below SAMPaMixin, or take another variant."
        )
    micro_batch.logits, micro_batch.loss = logits.detach(), loss.detach()
    if ascent:
        micro_batch.slope = slope
        return loss
    return _with_slope_of(micro_batch, slope, loss, edge)


def _has_several(outputs: Any, logits: Tensor) -> bool:
    """Whether a tuple has several tensors that might be logits, as those of starts and of ends."""
    return (
        not isinstance(outputs, dict)
        and sum(isinstance(each, Tensor) and each.shape == logits.shape for each in outputs) > 1
    )


def _slope(loss: Tensor, edge: GradientEdge) -> Tensor | None:
    (found,) = torch.autograd.grad(loss, [edge], torch.full_like(loss, SCALE), retain_graph=True, allow_unused=True)
    return None if found is None else found.float() / SCALE


def _with_slope_of(micro_batch: MicroBatch, slope: Tensor, loss: Tensor, edge: GradientEdge) -> Tensor:
    """`loss`, whose backward puts the slope that `micro_batch` keeps in the place of its own, `slope`, at `edge`.

    What else depends on the logits there, as a term that a trainer adds, has its own gradient.
    """
    scales = []  # what backward begins with: a share of the batch, and the scale of fp16
    loss = loss * 1.0  # a node of its own, whose gradient is that
    loss.register_hook(lambda grad: scales.append(grad.float()))

    def put_in_place(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        if not scales:
            raise ValueError(
                "variant: expected a loss that has the one of super().compute_loss() in it, because the variant puts another slope in that one's "
                "place, got one that is made of the outputs alone. Put it into a Trainer below SAMPaMixin, or take another variant."
            )
        difference = ((micro_batch.slope - slope) * scales[-1]).to(grads[edge.output_nr].dtype)
        return tuple(grad + difference if i == edge.output_nr else grad for i, grad in enumerate(grads))

    edge.node.register_prehook(put_in_place)
    return loss


def _as_computed(logits: Tensor) -> GradientEdge:
    """Where in the graph the model has made `logits`: under autocast accelerate gives copies of them, in single precision, of which no loss is made."""
    edge = get_gradient_edge(logits)
    return GradientEdge(*edge.node.next_functions[0]) if edge.node.name() == "ToCopyBackward0" else edge
