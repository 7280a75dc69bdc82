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
`Adapters`     what layers with LoRA adapters add to their output in a pass
=============  ==================================================================================

A part computes: tensors and numbers in, tensors and numbers out. It never touches weights, ranks or the optimizer. All that
it is given is the same on every process, and so is what it decides, as long as it draws from `Moment.generator` and from
no other source. Names that a part lists in `state` are what a checkpoint keeps of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..state import derive_seed


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
        adam_denominators: gives, for each trainable parameter, sqrt(v) + eps of Adam, shaped like it, v its bias-corrected second
            moment; None before its first step.
        norms: Euclidean norms ``(n,)`` of tensors like weights, one by one; of weights that FSDP2 has sharded, of which a part is
            given the shards that are here, those of the whole.
    """

    step: int = 0
    epoch: int = 0
    max_steps: int = 1
    num_samples: int = 0
    lr_fraction: float = 1.0
    seed: int = 0
    norms: Callable[[Sequence[Tensor]], Tensor] = field(
        default_factory=lambda: functional.norms, compare=False, repr=False
    )

    adam_denominators: Callable[[], Iterable[Tensor | None]] = field(
        default_factory=lambda: lambda: repeat(None), compare=False, repr=False
    )

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm ``()`` over all entries of `tensors`, like weights, wherever they are."""
        return functional.norms([self.norms(tensors)])[0]

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Generator of this step's draws for `purpose`: the same on all processes, and after a resume."""
        return torch.Generator(device).manual_seed(derive_seed(self.seed, purpose, self.step))


class Part:
    """One part of a recipe: its settings are what its constructor takes, its state what `state` names.

    A complex parameter, and a gradient of it, are given as real and imaginary parts, ``(..., 2)``.
    State is ``None``, plain values, tensors or lists of tensors; a list of tensors has one per trainable parameter.

    Attributes:
        state: names of what is kept in a checkpoint.
        on_shards: whether what it makes of a tensor like weights it makes entry by entry, with lengths from `Moment.norms`: then
            it can be given shards, as FSDP2 has them. A class that overrides a method that is given such tensors says so itself.
    """

    state: ClassVar[tuple[str, ...]] = ()
    on_shards: ClassVar[bool] = True

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """Get to know the trainable parameters of a run: the model's, in its order and by its names, then those of a loss, if any."""

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
        unit: whether ||eps_t|| is rho.
        reads_optimizer: whether it needs `Moment.adam_denominators`, and so all of the optimizer's state on every process.
    """

    needs_gradient: ClassVar[bool] = True
    unit: ClassVar[bool] = True
    reads_optimizer: ClassVar[bool] = False

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
        """See g~_t, to be read only, before it is mixed; called where `__call__` was."""


class Mask(Part):
    """Everything is perturbed.

    Attributes:
        scale: what to multiply rho by.
        fisher_samples: how many samples of the dataset `learn` wants to see squared gradients of; 0: none.
        descent: whether the parameters that `keeps` leaves out have no part in g~_t and in the update either.
    """

    scale: float = 1.0
    fisher_samples: int = 0
    descent: ClassVar[bool] = False

    def keeps(self, now: Moment) -> Sequence[bool] | None:
        """Per parameter, whether it is perturbed; None: all are. ||g_t|| is then that of the kept ones, so that ||eps_t|| is rho still. Asked once a step."""
        return None

    def thin(self, direction: list[Tensor], now: Moment) -> bool:
        """Set, in place, to zero which entries are not perturbed, the radius left as it is; whether there are any."""
        return False

    def observe(self, g: Sequence[Tensor], now: Moment) -> None:
        """See g_t, to be read only, zero where `keeps` left a parameter out of it; of steps in which it is finite."""

    def wants_fisher(self, now: Moment) -> bool:
        """Whether `learn` is to be called before this step's perturbation."""
        return False

    def learn(self, fisher: list[Tensor], now: Moment) -> None:
        """See the sums of squared gradients of `fisher_samples` samples drawn at random, at x_t."""


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
        """See g_t and g~_t, to be read only, of a step that ascended; `g` is empty where the mixing does not need g_t."""


@dataclass(frozen=True)
class Norms:
    """||g_t|| and ||g~_t|| of a step, and <g_t, g~_t> for a mixing that `reads_dot`, over all parameters."""

    ascent: float
    perturbed: float
    dot: float = float("nan")


class Mixing(Part):
    """G_t = g~_t.

    Attributes:
        needs_ascent: whether g_t has to be kept until g~_t is there, in memory of its own.
        reads_dot: whether it wants their inner product; needs g_t.
        by_entries: whether what becomes of an entry depends on this entry of g_t and g~_t and on `Norms` alone. Two processes
            that share an optimizer then hold half of both; for any other mixing they hold all. A class with a `__call__` of
            its own says so itself.
    """

    needs_ascent: ClassVar[bool] = False
    reads_dot: ClassVar[bool] = False
    by_entries: ClassVar[bool] = True

    def __call__(self, g_tilde: list[Tensor], g: Sequence[Tensor], norms: Norms, now: Moment) -> None:
        """Turn g~_t into the step's gradient, in place; `g` is g_t, empty without `needs_ascent`."""

    def reuse(self, g: list[Tensor], now: Moment) -> None:
        """Turn g_t into the step's gradient, in place, in a step that did not ascend."""

    def reached(self, ascent: Sequence[bool], perturbed: Sequence[bool] | None) -> list[bool]:
        """Per parameter, whether the step's gradient has a part of it, given which ones g_t and g~_t have (None: no g~_t)."""
        if perturbed is None:
            return list(ascent)
        return [a or p for a, p in zip(ascent, perturbed, strict=True)] if self.needs_ascent else list(perturbed)
