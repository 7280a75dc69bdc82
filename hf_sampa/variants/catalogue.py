"""Which variants there are: a registry of functions that make recipes, with what they cost and where they come from."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from .recipe import Recipe


# Why a variant has one timing only.
SKIPS = "a pair takes both gradients at once in every step, so that leaving one out saves no time"
NO_ASCENT = "it has no ascent gradient that a second process could take"
ONE_GRADIENT = "it takes one gradient in a step, so that there is none for a second process"
ONE_BATCH = "both of its gradients must be those of the same tensors, but g_{t+1} is of others"
PAIRED = "SAMPa's two gradients of one batch are what it must not have"
BY_LOSSES = "its choice of samples rests on losses that one process of a pair would have to wait for the other to tell"


@dataclass(frozen=True)
class Within:
    """Range of a variant's argument: from `low` to `high`, both or neither included."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else "any"
        return f"{'above' if self.open_low else 'from'} {self.low:g} {'to below' if self.open_high else 'to'} {self.high:g}"


@dataclass(frozen=True)
class OneOf:
    """Choices of a variant's argument."""

    choices: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return " or ".join(self.choices)


Positive = Annotated[float, Within(0, open_low=True)]
NonNegative = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
AboveZero = Annotated[float, Within(0, 1, open_low=True)]
Real = Annotated[float, Within()]
Count = Annotated[int, Within(1)]


@dataclass(frozen=True)
class Variant:
    """One entry of the catalogue.

    Attributes:
        name: what `variant` is to be set to.
        make: takes the variant's arguments, annotated with their ranges, and gives its recipe.
        source: the paper.
        passes: forward and backward passes per step.
        memory: numbers held besides SAM's, in units of d, the number of trainable weights.
        rho: the radius, unless the user says another.
        lmbda: what the variant sets lambda to, if it does.
        method: the only timing that it has, if there is only one.
        why: why it has no other.
        optimizer: options that the groups of the base optimizer must have, and what they are set to; None: to what they are.
    """

    name: str
    make: Callable[..., Recipe]
    source: str
    passes: str
    memory: str
    rho: float = 0.05
    lmbda: float | None = None
    method: str | None = None
    why: str = ""
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of what `make` says of itself."""
        return inspect.getdoc(self.make).partition("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments and their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.make).parameters.items()}

    @property
    def timings(self) -> tuple[str, ...]:
        """Values of `method` that it can have."""
        return (self.method,) if self.method else ("sampa", "sam")

    @property
    def for_adapters(self) -> bool:
        """Whether it needs a model with LoRA adapters."""
        return self.recipe({}).adapters.adds

    def recipe(self, arguments: dict[str, Any]) -> Recipe:
        """The recipe. Raises ValueError for an argument that is unknown or out of range."""
        return self.make(**self.complete(arguments))

    def complete(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`arguments`, checked and of the right types, with the defaults of those that are missing."""
        hints = get_type_hints(self.make, include_extras=True)
        known = self.defaults
        for name in arguments:
            if name not in known:
                raise ValueError(
                    f"variant_args: {self.name!r} has no argument {name!r}{suggestion(name, known)} It takes "
                    f"{', '.join(f'{key}={value}' for key, value in known.items()) or 'none'}."
                )
        return {**known, **{name: self._checked(name, hints[name], value) for name, value in arguments.items()}}

    def _checked(self, name: str, hint: Any, value: Any) -> Any:
        kind, allowed = hint.__origin__, hint.__metadata__[0]
        try:
            converted = kind(value)
            if converted not in allowed or (kind is int and float(value) != converted) or isinstance(value, bool):
                raise ValueError
            if kind is float and not math.isfinite(converted):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            what = {float: "a number", int: "a whole number", str: "one"}[kind]
            raise ValueError(
                f"variant_args: {name} of {self.name!r} is to be {what}, {allowed}, got {value!r}."
            ) from None
        return converted


VARIANTS: dict[str, Variant] = {}


def variant(**facts: Any) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Decorator that enters a function, under its own name, into the catalogue; `facts` are those of `Variant`."""

    def enter(make: Callable[..., Recipe]) -> Callable[..., Recipe]:
        name = make.__name__
        VARIANTS[name] = Variant(name=name, make=make, **facts)
        return make

    return enter


def find(name: str) -> Variant:
    """The variant called `name`. Raises ValueError, naming the nearest ones, where there is none."""
    if not isinstance(name, str):
        raise ValueError(
            f"variant: expected the name of one, got {name!r}. `python -m hf_sampa.variants` shows them all."
        )
    key = name.lower().replace("-", "_")
    if key not in VARIANTS:
        raise ValueError(
            f"variant: there is no {name!r}{suggestion(name, VARIANTS)} `python -m hf_sampa.variants` shows them all."
        )
    return VARIANTS[key]


def suggestion(name: str, known: Any) -> str:
    """The end of a sentence that names what `name` may have been meant to be."""
    near = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def parse_arguments(given: dict[str, Any] | list[str] | None) -> dict[str, Any]:
    """Arguments of a variant as a dict, from one or from ``name=value`` strings, as a command line has them; several in a string by spaces."""
    words = [given] if isinstance(given, str) else list(given) if isinstance(given, dict) else given or []
    if not isinstance(words, list | tuple) or not all(isinstance(each, str) for each in words):
        raise ValueError(
            f"variant_args: expected a dict of arguments by name, or a list of 'name=value', got {given!r}."
        )
    if isinstance(given, dict):
        return dict(given)
    pairs = [each.partition("=") for word in words for each in word.split() or [word]]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(
                f"variant_args: expected name=value, as in `--variant_args eta=0.01`, got {name + equals + value!r}."
            )
    return {name: value for name, _, value in pairs}
