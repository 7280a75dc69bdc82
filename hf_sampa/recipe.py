"""What a sharpness-aware step does, as a recipe of parts; when and where its gradients are computed is the engine's.

=============  ==================================================================================
part           decides
=============  ==================================================================================
`Direction`    how g_t becomes the perturbation eps_t
`Mask`         which parameters, or which of their entries, are perturbed
`Samples`      which samples of B_t the two gradients are taken on
`When`         whether this step ascends at all
`Loss`         what the gradients are gradients of
`Mixing`       how g_t and g~_t become the gradient of the step
=============  ==================================================================================

A part computes: tensors and numbers in, tensors and numbers out. It never touches weights, ranks or the optimizer. All that
it is given is the same on every process, and so is what it decides, as long as it draws from `Moment.generator` and from
no other source. Names that a part lists in `state` are what a checkpoint keeps of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .randomness import derive_seed


@dataclass(frozen=True)
class Moment:
    """Where a run is when a part is asked.

    Attributes:
        step: t, from 0.
        epoch: of the data stream, from 0.
        max_steps: T.
        num_samples: in the dataset; 0 where that is not known.
        lr_fraction: the learning rate in force, as a part of its first group's peak; 0 to 1.
        seed: of the run.
    """

    step: int = 0
    epoch: int = 0
    max_steps: int = 1
    num_samples: int = 0
    lr_fraction: float = 1.0
    seed: int = 0

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Generator of this step's draws for `purpose`: the same on all processes, and after a resume."""
        return torch.Generator(device).manual_seed(derive_seed(self.seed, purpose, self.step))


class Part:
    """One part of a recipe: its settings are what its constructor takes, its state what `state` names.

    State is ``None``, plain values, tensors or lists of tensors; a list of tensors has one per trainable parameter.
    """

    state: ClassVar[tuple[str, ...]] = ()

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """Get to know the trainable parameters of a run, and where in `model` they are."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Go on where `state_dict` was taken; lists of tensors move to where `params` are."""
        for name in self.state:
            value = state[name]
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                value = [each.to(param.device) for each, param in zip(value, params, strict=True)]
            setattr(self, name, value)


class Direction(Part):
    """eps_t = rho g_t / ||g_t|| (SAM, Foret et al. 2021, eq. 2).

    Attributes:
        needs_gradient: whether the direction is made of g_t; if not, g_t is not computed where nothing else needs it.
        changes_gradient: whether the call writes to the list it is given.
        unit: whether ||eps_t|| is rho.
    """

    needs_gradient: ClassVar[bool] = True
    changes_gradient: ClassVar[bool] = False
    unit: ClassVar[bool] = True

    def __call__(self, g: list[Tensor], x: Sequence[Tensor], norm: float | Tensor, now: Moment) -> float | Tensor:
        """Turn g_t into a direction d_t, in place.

        Args:
            g: g_t, zero where a mask left it out.
            x: x_t, same shapes, to be read only.
            norm: ||g_t||.
            now: the step.

        Returns:
            What to divide by: eps_t = rho d_t / (this).
        """
        return norm

    def radius(self, now: Moment) -> float:
        """What to multiply rho by in this step."""
        return 1.0

    def observe(self, g_tilde: Sequence[Tensor]) -> None:
        """See g~_t, to be read only, before it is mixed."""


class Mask(Part):
    """Everything is perturbed.

    Attributes:
        scale: what to multiply rho by.
        descent: whether the parameters that `keeps` leaves out have no part in g~_t and in the update either.
    """

    scale: float = 1.0
    descent: ClassVar[bool] = False

    def keeps(self, now: Moment) -> Sequence[bool] | None:
        """Per parameter, whether it is perturbed; None: all are. The radius is that of the kept ones alone."""
        return None

    def thin(self, direction: list[Tensor], now: Moment) -> bool:
        """Set, in place, to zero which entries are not perturbed, the radius left as it is; whether there are any."""
        return False

    def observe(self, g: Sequence[Tensor], now: Moment) -> None:
        """See g_t, to be read only."""


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
        reads_indices: whether `recall` and `record` are to be called, with the samples' places in the dataset.
        teacher_decay: of a running mean of the weights, whose logits (in evaluation mode) are `Seen.teacher`; None: of none.
    """

    reads_logits: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False
    teacher_decay: float | None = None

    def __call__(self, loss: Tensor, seen: Seen, now: Moment) -> Tensor:
        """The loss ``()`` to take the gradient of, given the trainer's own, a mean over the samples."""
        return loss

    def recall(self, indices: Tensor, now: Moment) -> Tensor | None:
        """Teacher logits ``(n, classes)`` of these samples ``(n,)``; None where there are none yet."""
        return None

    def record(self, indices: Tensor, logits: Tensor, now: Moment) -> None:
        """See the logits ``(n, classes)`` of these samples ``(n,)``."""


class When(Part):
    """Every step ascends.

    Attributes:
        reads_gradient: whether `__call__` needs the norm of g_t; otherwise it is asked before g_t is computed.
    """

    reads_gradient: ClassVar[bool] = False

    def __call__(self, now: Moment, norm: float | None) -> bool:
        """Whether to ascend, given ||g_t|| (None where it is not computed yet)."""
        return True

    def observe(self, g: Sequence[Tensor], g_tilde: Sequence[Tensor], now: Moment) -> None:
        """See g_t and g~_t, to be read only, of a step that ascended."""


@dataclass(frozen=True)
class Norms:
    """||g_t|| and ||g~_t|| of a step, over all parameters."""

    ascent: float
    perturbed: float


class Mixing(Part):
    """G_t = g~_t.

    Attributes:
        needs_ascent: whether g_t has to be kept until g~_t is there, in memory of its own.
    """

    needs_ascent: ClassVar[bool] = False

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        """Turn g~_t into the step's gradient, in place; `g` is g_t, empty without `needs_ascent`."""

    def reuse(self, g: list[Tensor], now: Moment) -> None:
        """Turn g_t into the step's gradient, in place, in a step that did not ascend."""

    def reached(self, ascent: Sequence[bool], perturbed: Sequence[bool] | None) -> list[bool]:
        """Per parameter, whether the step's gradient has a part of it, given which ones g_t and g~_t have (None: no g~_t)."""
        if perturbed is None:
            return list(ascent)
        return [a or p for a, p in zip(ascent, perturbed, strict=True)] if self.needs_ascent else list(perturbed)


@dataclass
class Recipe:
    """The parts of a step; the default is SAM, or SAMPa where the timing is parallel."""

    direction: Direction
    mask: Mask
    samples: Samples
    when: When
    loss: Loss
    mixing: Mixing

    def __init__(
        self,
        *,
        direction: Direction | None = None,
        mask: Mask | None = None,
        samples: Samples | None = None,
        when: When | None = None,
        loss: Loss | None = None,
        mixing: Mixing | None = None,
    ):
        self.direction, self.mask = direction or Direction(), mask or Mask()
        self.samples, self.when = samples or Samples(), when or When()
        self.loss, self.mixing = loss or Loss(), mixing or Mixing()

    def parts(self) -> dict[str, Part]:
        """By the name of their kind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def plain(self) -> bool:
        """Whether this is SAM itself."""
        return all(type(part) in (Direction, Mask, Samples, When, Loss, Mixing) for part in self.parts().values())

    @property
    def reads_logits(self) -> bool:
        """Whether a part needs to know the logits of single samples."""
        return self.samples.reads_losses or self.samples.looks_first or self.loss.reads_logits or self.reads_indices

    @property
    def reads_indices(self) -> bool:
        """Whether a part needs to know which samples of the dataset it sees."""
        return self.samples.reads_indices or self.loss.reads_indices

    @property
    def needs_gradient(self) -> bool:
        """Whether a step that ascends needs g_t."""
        return self.direction.needs_gradient or self.mixing.needs_ascent or self.when.reads_gradient

    @property
    def waits(self) -> bool:
        """Whether a part must know that g_t is finite before it is used: to decide, or to remember it."""
        return bool(self.when.reads_gradient or self.direction.state or self.mask.state)

    def check_parallel(self) -> None:
        """Raise ValueError where SAMPa's timing has no place for a part."""
        problems = {
            "when leaves out steps": type(self.when) is not When,
            "direction needs no g_t": not self.direction.needs_gradient,
            "mask keeps parameters out of the update": self.mask.descent,
            "samples are chosen by losses or are not those of B_t": type(self.samples) is not Samples,
            "loss has a teacher": self.loss.teacher_decay is not None or self.loss.reads_indices,
        }
        if found := [what for what, holds in problems.items() if holds]:
            raise ValueError(
                f"method: expected 'sam' for this recipe, whose {' and whose '.join(found)}; got 'sampa', which takes both "
                "gradients of all parameters in every step."
            )

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """Tell all parts of a run's parameters."""
        for part in self.parts().values():
            part.bind(model, names, params)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """State of the parts that have any, by the name of their kind."""
        return {name: part.state_dict() for name, part in self.parts().items() if part.state}

    def load_state_dict(self, state: dict[str, dict[str, Any]], params: Sequence[Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        for name, part in self.parts().items():
            if part.state:
                part.load_state_dict(state[name], params)
