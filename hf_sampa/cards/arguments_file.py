"""``training_args.bin``, Trainer's pickle of all arguments: it is pushed, so that secrets are left out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from ..state import stood_in
from .harmless import is_harmless, is_secret, types_of


@contextmanager
def without_secrets(args: Any) -> Iterator[None]:
    """Within the block a pickle of the training arguments `args` has None where they have a secret; they keep it.

    Only there: processes that are started with arguments get them as pickles, too, and copies are made like pickles.
    """
    # Every object has one from Python 3.11 on.
    state_of = getattr(args, "__getstate__", lambda: vars(args))

    def pickled() -> dict[str, Any]:
        return {name: _blank(name, value) for name, value in state_of().items() if name != "__getstate__"}

    with stood_in(args, "__getstate__", pickled):
        yield


def _blank(name: str, value: Any) -> Any:
    """`value` of the setting `name`, or None if it is a secret by its name or its look; so within dicts and lists."""
    if type(value) is dict:
        return {key: _blank(str(key), each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_blank(name, each) for each in value)
    secret = isinstance(value, str | int | float) and not isinstance(value, bool | Enum) and is_secret(name, value)
    return None if secret else value


def texts_in(args: Any) -> list[str]:
    """Names of fields that neither transformers nor this package declares, whose texts are in the pickle as they were given."""
    bases = [each for each in type(args).__mro__ if each.__module__.partition(".")[0] in ("transformers", "hf_sampa")]
    known, declared = types_of(*filter(dataclasses.is_dataclass, bases)), types_of(type(args))
    left = {
        field.name: _blank(field.name, getattr(args, field.name))
        for field in dataclasses.fields(args)
        if field.name not in known and getattr(args, field.name) != field.default
    }
    return [name for name, value in left.items() if value and not is_harmless(name, value, declared[name])]
