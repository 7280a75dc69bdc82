"""What goes into a gradient and what comes out of it: batches, losses, norms; on one process, on all, and as a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Batch(Protocol):
    """An update batch B_t: its micro-batches and a number that tells it from other batches."""

    fingerprint: int
    update: int  # t
    epoch: int

    def __iter__(self) -> Any: ...


@dataclass(frozen=True)
class StepReport:
    """What a step saw, equal on all ranks; NaN what it did not need. Losses are means over the update batch.

    Attributes:
        loss: f(y_{t+1}; B_{t+1}) for SAMPa, or f(y_t; B_t) once more where there is no B_{t+1}; f(x_t; B_t) for SAM, and in a step of the
            base optimizer alone.
        perturbed_loss: f(x~_t; B_t).
        sharpness: f(x~_t; B_t) - f(y_t; B_t) for SAMPa, f(x~_t; B_t) - f(x_t; B_t) for SAM.
        ascent_grad_norm: ||g_t||.
        ascent_cosine: cosine of the angle between g~_t and the perturbation x~_t - x_t, as rounding left it, which has
            the direction of g_t; 0 where rho is 0.
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
    dot: float  # with (x~_t - x_t) / ||x~_t - x_t||; 0 in the LOOKAHEAD role
    fingerprints: tuple[int, ...]  # per replica
    used: tuple[bool, ...]  # per parameter: whether backward reached it
    model_norm: float | None = None  # over the model's parameters, which clipping goes by; None: over all

    @property
    def clipped_norm(self) -> float:
        return self.norm if self.model_norm is None else self.model_norm

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


@dataclass(frozen=True)
class Found:
    """One gradient as the process that computed it knows it: scalar tensors ``()``, see `Pass`."""

    fingerprint: int
    loss: Tensor
    norm: Tensor
    dot: Tensor
    used: list[bool]
    model_norm: Tensor
