"""Losses: what the gradients are gradients of."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .parts import Moment
from .sample_parts import Loss, Seen


class Bilevel(Loss):
    """g_t ascends on a lower bound of the 0-1 loss (BiSAM, Xie et al. 2024b, eq. 8): per sample of label y and logits z,

    (1 / mu) log sum_j exp(mu phi(z_j - z_y)), phi(u) = 1 - log(1 + exp(log(e - 1) - u)) or tanh(alpha u).

    Args:
        mu: above 0.
        phi: "log" or "tanh".
        alpha: above 0; for "tanh" alone.
        separate: see `Loss`.
    """

    reads_logits = True

    def __init__(self, mu: float, phi: str, alpha: float, separate: bool):
        self.mu, self.phi, self.alpha, self.separate = mu, phi, alpha, separate

    def __call__(self, loss: Tensor, seen: Seen, now: Moment) -> Tensor:
        if not seen.ascent:
            return loss
        logits = seen.logits.float()
        margin = logits - logits.gather(1, seen.labels[:, None])
        bound = (
            torch.tanh(self.alpha * margin) if self.phi == "tanh" else 1 - F.softplus(math.log(math.e - 1) - margin)
        )
        return (torch.logsumexp(self.mu * bound, dim=1) / self.mu).mean()


class Functional(Loss):
    """g~_t is the logits' Jacobian at x~_t times the slope of the loss at x_t, or y_t (Functional SAM, Singh et al. 2025).

    The perturbation then changes the function that the model is, and not how steep the loss is at what it says. Terms of the loss that
    are not made of the logits have their gradient at x~_t.
    """

    reads_logits = keeps_slope = True


class Distilled(Loss):
    """The loss plus lam tau^2 KL(softmax(teacher / tau) || softmax(z / tau)), from an epoch on.

    Args:
        lam: weight, at least 0; 0 is the loss itself.
        tau: temperature, above 0.
        start: part of the run after which it begins, in [0, 1].
    """

    reads_logits = True

    def __init__(self, lam: float, tau: float, start: float):
        self.lam, self.tau, self.start = lam, tau, start

    def __call__(self, loss: Tensor, seen: Seen, now: Moment) -> Tensor:
        if seen.teacher is None or now.step < self.start * now.max_steps:
            return loss
        teacher = F.log_softmax(seen.teacher.float() / self.tau, dim=1)
        own = F.log_softmax(seen.logits.float() / self.tau, dim=1)
        return loss + self.lam * self.tau**2 * F.kl_div(own, teacher, reduction="batchmean", log_target=True)


class FromTheMean(Distilled):
    """The teacher is a running mean of the weights (MESA, Du et al. 2022b, eq. 8).

    Args:
        decay: of the mean, in [0, 1].
    """

    def __init__(self, lam: float, tau: float, start: float, decay: float):
        super().__init__(lam, tau, start)
        self.teacher_decay = decay


class FromThePast(Distilled):
    """The teacher is what the model itself said of the sample some epochs ago (SAF, Du et al. 2022b, eq. 6).

    Args:
        epochs: how many, at least 1.
    """

    reads_indices = True
    state = ("table", "written")

    def __init__(self, lam: float, tau: float, start: float, epochs: int):
        super().__init__(lam, tau, start)
        self.epochs = epochs
        self.table: Tensor | None = None  # (epochs + 1, samples, classes): the logits of the last epochs
        self.written: Tensor | None = None  # (epochs + 1, samples): in which epoch they were written; -1: never

    def recall(self, indices: Tensor, now: Moment) -> Tensor | None:
        row = (now.epoch - self.epochs) % (self.epochs + 1)
        if (
            now.epoch < self.epochs
            or self.table is None
            or not (self.written[row, indices] == now.epoch - self.epochs).all()
        ):
            return None
        return self.table[row, indices]

    def record(self, indices: Tensor, logits: Tensor, now: Moment) -> None:
        if self.table is None:
            self.table = torch.zeros(self.epochs + 1, now.num_samples, logits.shape[1])
            self.written = torch.full((self.epochs + 1, now.num_samples), -1)
        row, known = now.epoch % (self.epochs + 1), logits.isfinite().all(dim=1)
        self.table[row, indices[known]] = logits[known].float().cpu()
        self.written[row, indices[known]] = now.epoch
