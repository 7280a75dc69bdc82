"""A recipe: the parts of a sharpness-aware step, and what the engine has to know of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from .parts import Direction, Mask, Mixing, Part, When
from .sample_parts import Loss, Samples


@dataclass
class Recipe:
    """The parts of a step; the default is SAM, or SAMPa where the timing is parallel.

    Attributes:
        settings: what each part is, by the name of its kind; a run goes on only where these are the same.
    """

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
        if self.samples.sharded and len(self.changed_parts()) > 1:
            raise ValueError(
                "samples: expected SAM's own other parts beside samples in shards, whose perturbations are taken one by one, "
                f"got {', '.join(self.changed_parts())}. Leave one of them out."
            )
        # As they are before a run: what a part learns in it is no setting.
        self.settings = {name: _described(part) for name, part in self.parts().items()}
        if type(self.samples).choose is not Samples.choose and not (
            self.samples.looks_first or self.samples.reads_indices
        ):
            raise ValueError(
                "samples: expected looks_first or reads_indices to be True where `choose` is overridden, got neither: it would "
                f"never be asked. Set in {type(self.samples).__name__} the one whose tensor it uses."
            )

    def parts(self) -> dict[str, Part]:
        """By the name of their kind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def changed_parts(self) -> dict[str, Part]:
        """Those that are not SAM's own."""
        own = (Direction, Mask, Samples, When, Loss, Mixing)
        return {name: part for name, part in self.parts().items() if type(part) not in own}

    @property
    def plain(self) -> bool:
        """Whether this is SAM itself."""
        return not self.changed_parts()

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
            "samples are chosen by losses or are not those of B_t": self.samples.selects,
            "loss has a teacher": self.loss.teacher_decay is not None or self.loss.reads_indices,
        }
        if found := [what for what, holds in problems.items() if holds]:
            raise ValueError(
                f"method: expected 'sam' for this recipe, whose {' and whose '.join(found)}; got 'sampa', which takes both "
                "gradients of all parameters in every step."
            )

    def check_shared_optimizer(self) -> None:
        """Raise ValueError where a process that has half of g_t could not compute its half of the perturbation."""
        if not self.plain:
            raise ValueError(
                "shard_optimizer: expected variant 'sam', whose perturbation each process can compute for half of the "
                f"parameters, got another {' and '.join(self.changed_parts())}. Leave one of them out."
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


def _described(part: Part) -> str:
    """What `part` is, with the plain values among its attributes."""
    plain = {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str)}
    return f"{type(part).__qualname__}({', '.join(f'{name}={value}' for name, value in plain.items())})"
