"""What the sharpness-aware steps are made of: displaced weights, gradients in buckets, and the numbers of a step.

Nothing here knows of Trainer: a batch is anything that iterates over micro-batches and has a `fingerprint`; `gradient`
runs one micro-batch forward and backward and returns its share of the batch's mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .buckets import Buckets, GradientRecorder
from .exchange import Exchange
from .functional import NORM_GUARD, global_dot, global_norm
from .roles import Role


MAX_SKIPPED_IN_A_ROW = 20


class Batch(Protocol):
    """An update batch B_t: its micro-batches and a number that tells it from other batches."""

    fingerprint: int

    def __iter__(self) -> Any: ...


@dataclass(frozen=True)
class StepReport:
    """What a step saw, equal on all ranks. Losses are means over the update batch.

    Attributes:
        loss: f(y_{t+1}; B_{t+1}) for SAMPa, f(x_t; B_t) for SAM.
        perturbed_loss: f(x~_t; B_t).
        sharpness: f(x~_t; B_t) - f(y_t; B_t) for SAMPa, f(x~_t; B_t) - f(x_t; B_t) for SAM.
        ascent_grad_norm: ||g_t||.
        ascent_cosine: cosine of the angle between g_t and g~_t.
        skipped: whether a gradient was not finite, so that the step leaves weights and optimizer as they are.
    """

    loss: float
    perturbed_loss: float
    sharpness: float
    ascent_grad_norm: float
    ascent_cosine: float
    skipped: bool


@dataclass(frozen=True)
class Pass:
    """One gradient as all ranks know it after `_share`: mean loss, norm, and what belongs to it."""

    loss: float
    norm: float
    dot: float
    fingerprints: tuple[int, ...]  # per replica
    used: tuple[bool, ...]  # per parameter: whether backward reached it

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


class SharpnessAware:
    """What SAMPa and SAM have in common: displaced weights, gradients in buckets, the numbers of a step.

    Args:
        model: what is trained: its parameters with `requires_grad`.
        base_optimizer: holds them, takes the step afterwards.
        exchange: connects the processes.
        rho: radius of the perturbation, >= 0.
        clip: clips ``.grad`` in place as the Trainer does before the base optimizer's step, or does nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Optimizer,
        exchange: Exchange,
        *,
        rho: float,
        clip: Callable[[], None],
    ):
        trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.names, self.params = list(trainable), list(trainable.values())
        self.statistics = _running_statistics(model)
        self.base_optimizer, self.exchange, self.rho, self.clip = base_optimizer, exchange, rho, clip
        self.roles = exchange.mesh.roles
        self.perturbed_grads = Buckets(self.params)  # g~_t, then G_t
        self.ascent_grads = Buckets(self.params)  # g_t, then g_{t+1}
        self.skipped_steps = self.skipped_in_a_row = 0
        self._saved = [torch.empty_like(param) for param in self.params]  # x_t while the weights are displaced
        self._recorder = GradientRecorder(self.params)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._recorder.close()

    @contextmanager
    def displaced(self, role: Role):
        """Within the block the weights may be moved; afterwards, whatever happened, they are x_t again, bit for bit.

        Running statistics of normalisation layers come from the LOOKAHEAD pass, once per batch: those that the
        PERTURBED pass leaves behind are undone too.
        """
        kept = [each.clone() for each in self.statistics] if role is Role.PERTURBED else []
        with torch.no_grad():
            torch._foreach_copy_(self._saved, self.params)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self._saved)
                for each, before in zip(self.statistics, kept, strict=False):
                    each.copy_(before)

    def _gradient(self, batch: Batch, gradient: Callable, role: Role) -> tuple[Tensor, Tensor]:
        """Gradient of f on `batch` at the weights as they are, averaged over replicas and swapped across roles.

        Returns the loss ``()`` and, for the PERTURBED role, the inner product of g_t and this gradient ``()``.
        """
        mine, theirs = self._gradients_of(role)
        dots: list[Tensor] = []

        def on_full(bucket: int) -> None:
            if role is Role.PERTURBED:
                # g_t is read for the last time here: its bucket receives g_{t+1}.
                dots.append(global_dot([theirs.flats[bucket]], [mine.flats[bucket]]))
            self.exchange.start(mine.flats[bucket], theirs.flats[bucket])

        self._recorder.start()
        micro_batches = list(batch)
        losses = []
        for i, micro_batch in enumerate(micro_batches):
            with self._recorder.record(mine, on_full if i + 1 == len(micro_batches) else None):
                losses.append(gradient(micro_batch))
        self.exchange.finish()
        loss = torch.stack(losses).sum().double()
        return loss, torch.stack(dots).sum() if dots else torch.zeros_like(loss)

    def _gradients_of(self, role: Role) -> tuple[Buckets, Buckets]:
        pair = (self.perturbed_grads, self.ascent_grads)
        return pair if role is Role.PERTURBED else pair[::-1]

    def _share(self, passes: dict[Role, tuple[Batch, Tensor, Tensor, list[bool]]]) -> dict[Role, Pass]:
        """Tell all ranks what this one found; one small all-gather and one host-device sync.

        Args:
            passes: per role played here, the batch, its loss, its inner product with g_t, and the parameters reached.
        """
        device, count = self.params[0].device, len(self.params)
        numbers, integers = torch.zeros(2, 3, dtype=torch.float64, device=device), torch.zeros(2, 1 + count).long()
        for role, (batch, loss, dot, used) in passes.items():
            norm = global_norm(self._gradients_of(role)[0].flats)
            numbers[role] = torch.stack([loss, norm, dot])
            integers[role] = torch.tensor([batch.fingerprint, *used])
        row = torch.cat([numbers.view(torch.int64), integers.to(device)], dim=1)
        rows = self.exchange.gather(row).cpu()
        self.exchange.broadcast(self.statistics, source=self.exchange.mesh.ranks_of(Role.LOOKAHEAD)[0])
        found = {}
        for role in Role:
            of_role = rows[self.exchange.mesh.ranks_of(role), role]
            loss, norm, dot = of_role[:, :3].contiguous().view(torch.float64).mean(dim=0).tolist()
            used = of_role[:, 4:].any(dim=0).tolist()
            found[role] = Pass(loss, norm, dot, tuple(of_role[:, 3].tolist()), tuple(used))
        return found

    def _finish(self, ascent: Pass, perturbed: Pass, loss: float, used: Iterable[bool], skipped: bool) -> StepReport:
        """Put G_t (or, where the step is skipped, nothing) into ``.grad``."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps += skipped
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"Expected a finite gradient at least once in {MAX_SKIPPED_IN_A_ROW} steps, but got NaN or infinity "
                f"in all of the last {self.skipped_in_a_row}. Lower the learning rate or rho, and look for bad values "
                "in the data; the weights are those of the last good step."
            )
        for param, grad, is_used in zip(self.params, self.perturbed_grads.views, used, strict=True):
            param.grad = grad if is_used and not skipped else None
        return StepReport(
            loss=loss,
            perturbed_loss=perturbed.loss,
            sharpness=perturbed.loss - ascent.loss,
            ascent_grad_norm=ascent.norm,
            ascent_cosine=perturbed.dot / (ascent.norm * perturbed.norm + NORM_GUARD),
            skipped=skipped,
        )


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers of BatchNorm and its like, which forward changes in training."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for layer in layers if layer.track_running_stats for buffer in layer.buffers(recurse=False)]
