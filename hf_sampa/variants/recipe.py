"""A recipe: the parts of a sharpness-aware step, and what the engine has to know of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from .adapters import Adapters
from .parts import Direction, Mask, Mixing, Part, When
from .sample_parts import Loss, Samples


KINDS = {
    "direction": Direction,
    "mask": Mask,
    "samples": Samples,
    "when": When,
    "loss": Loss,
    "mixing": Mixing,
    "adapters": Adapters,
}
# Methods that are called only where one of these attributes says so.
ASKED = {
    ("samples", "choose"): ("looks_first", "reads_indices"),
    ("samples", "narrow"): ("looks_again",),
    ("samples", "observe"): ("reads_losses",),
    ("loss", "__call__"): ("reads_logits",),
    ("loss", "recall"): ("reads_indices",),
    ("loss", "record"): ("reads_indices",),
    ("adapters", "__call__"): ("adds",),
    ("adapters", "begin"): ("adds",),
}


# Methods that are given tensors like weights.
READ_WEIGHTS = {
    "direction": ("__call__", "observe"),
    "mask": ("thin", "observe", "learn"),
    "when": ("observe",),
    "mixing": ("__call__", "reuse"),
}


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
    adapters: Adapters

    def __init__(
        self,
        *,
        direction: Direction | None = None,
        mask: Mask | None = None,
        samples: Samples | None = None,
        when: When | None = None,
        loss: Loss | None = None,
        mixing: Mixing | None = None,
        adapters: Adapters | None = None,
    ):
        self.direction, self.mask = direction or Direction(), mask or Mask()
        self.samples, self.when = samples or Samples(), when or When()
        self.loss, self.mixing, self.adapters = loss or Loss(), mixing or Mixing(), adapters or Adapters()
        for name, part in self.parts().items():
            if not isinstance(part, KINDS[name]):
                found = f"the class {part.__name__}" if isinstance(part, type) else type(part).__name__
                raise ValueError(f"{name}: expected an instance of a {KINDS[name].__name__}, got {found}.")
        if self.samples.sharded and len(self.changed_parts()) > 1:
            raise ValueError(
                "samples: expected SAM's own other parts beside samples in shards, whose perturbations are taken one by one, "
                f"got {', '.join(self.changed_parts())}. Leave one of them out."
            )
        # As they are before a run: what a part learns in it is no setting.
        self.settings = {name: _described(part) for name, part in self.parts().items()}
        self._check_asked()

    def parts(self) -> dict[str, Part]:
        """By the name of their kind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def changed_parts(self) -> dict[str, Part]:
        """Those that are not SAM's own."""
        return {name: part for name, part in self.parts().items() if type(part) is not KINDS[name]}

    def _check_asked(self) -> None:
        """Raise ValueError where a method is overridden that nobody would call."""
        for (kind, method), flags in ASKED.items():
            part = getattr(self, kind)
            overridden = getattr(type(part), method) is not getattr(KINDS[kind], method)
            # A part that sets a flag by its settings knows of it.
            if overridden and not any(getattr(part, flag) or flag in vars(part) for flag in flags):
                raise ValueError(
                    f"{kind}: expected {' or '.join(flags)} to be True where `{method}` is overridden, got "
                    f"{'neither' if len(flags) > 1 else 'False'}: it would never be called. Set it in {type(part).__name__}."
                )

    @property
    def plain(self) -> bool:
        """Whether this is SAM itself."""
        return not self.changed_parts()

    @property
    def reads_logits(self) -> bool:
        """Whether a part needs to know the logits of single samples."""
        return (
            self.samples.reads_losses
            or self.samples.looks_first
            or self.loss.reads_logits
            or self.loss.reads_indices
            or self.samples.looks_again
        )

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
        observes = type(self.mask).observe is not Mask.observe
        return bool(self.when.reads_gradient or self.direction.state or self.mask.state or observes)

    def check_parallel(self) -> None:
        """Raise ValueError where SAMPa's timing has no place for a part."""
        problems = {
            "when leaves out steps": type(self.when) is not When,
            "direction needs no g_t": not self.direction.needs_gradient,
            "mask keeps parameters out of the update": self.mask.descent,
            "samples are chosen by losses or are not those of B_t": self.samples.selects,
            "adapters add to what layers compute": self.adapters.adds,
            "loss has a teacher": self.loss.teacher_decay is not None or self.loss.reads_indices,
        }
        if found := [what for what, holds in problems.items() if holds]:
            raise ValueError(
                f"method: expected 'sam' for this recipe, whose {' and whose '.join(found)}; got 'sampa', which takes both "
                "gradients of all parameters in every step."
            )

    def check_shards(self, count: int) -> None:
        """Raise ValueError where a part cannot be given the weights in `count` shards. FSDP2 has no gradients of single samples, be it in one."""
        parts = ((getattr(self, name), methods) for name, methods in READ_WEIGHTS.items())
        alone = [part for part, methods in parts if count > 1 and not _on_shards(part, methods)]
        if count > 1 and self.samples.sharded:
            alone.append(self.samples)
        if self.mask.fisher_samples and self.mask not in alone:
            alone.append(self.mask)
        if self.adapters.adds:
            alone.append(self.adapters)
        if self.loss.keeps_slope:  # FSDP2 takes that for the whole of a backward
            alone.append(self.loss)
        whole = [type(part).__name__ for part in alone]
        if whole:
            raise ValueError(
                f"fsdp: expected a variant, or a recipe, that can be given shards of the weights, but {' and '.join(whole)} looks at "
                "all entries at once, or wants gradients that are not averaged over processes or not of the whole model, or adds to what layers compute. Take another variant, or train without "
                "FSDP. A part of one's own that treats every entry alone, and takes lengths from Moment.norms, says on_shards = True."
            )

    @property
    def by_entries(self) -> bool:
        """Whether a process that holds a part of g_t and g~_t can make its part of G_t, and no part wants to see all of it."""
        observes = type(self.direction).observe is not Direction.observe or type(self.when).observe is not When.observe
        mixing = type(self.mixing)
        says_so = vars(next(kind for kind in mixing.__mro__ if "__call__" in vars(kind))).get("by_entries", False)
        return says_so and mixing.by_entries and not mixing.state and not observes

    @property
    def scales(self) -> bool:
        """Whether eps_t is g_t times a number, so that who holds a part of g_t can make its part of x~_t."""
        direction = type(self.direction).__call__ is Direction.__call__ and type(self.mask) is Mask
        return direction and not self.samples.sharded and not self.loss.separate

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


def _on_shards(part: Part, methods: Sequence[str]) -> bool:
    """Whether each class that overrides one of `methods` says that it can be given shards."""
    kinds = (kind for kind in type(part).__mro__ if kind not in (*KINDS.values(), Part, object))
    return part.on_shards and all(
        vars(kind).get("on_shards", False) for kind in kinds if any(name in vars(kind) for name in methods)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _described(part: Part) -> str:
    """What `part` is, with the plain values among its attributes."""
    plain = {name: value for name, value in vars(part).items() if name not in part.state and _is_plain(value)}
    return f"{type(part).__qualname__}({', '.join(f'{name}={value}' for name, value in plain.items())})"


def check_recipe(recipe: Any, variant: str) -> None:
    """Raise ValueError for what cannot be a run's own recipe, beside the name of its variant."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ValueError(
            f"recipe: expected a Recipe, got {recipe!r}. A part goes into one, as in Recipe(direction=...); the name of a "
            "variant is for SAMPaTrainingArguments."
        )
    if recipe is not None and variant != "sam":
        raise ValueError(
            f"recipe: expected variant='sam', the default, beside a recipe of one's own, got {variant!r}. Leave one of them out."
        )
