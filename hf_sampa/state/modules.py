"""Modules with a part in the loss that a trainer keeps besides its model: losses, teachers, critics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


MOST_MODULES = 64  # of a list that are looked at: teachers are few, samples are many


def other_modules(owner: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Modules that `owner`, a trainer, keeps as its attributes, alone or in a dict, besides `model`, by name."""
    found: dict[str, nn.Module] = {}
    for name, value in vars(owner).items():
        several = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value[:MOST_MODULES])
            if type(value) in (list, tuple)
            else ()
        )
        inside = {f"{name}.{key}": each for key, each in several} if several else {name: value}
        found |= {key: each for key, each in inside.items() if isinstance(each, nn.Module)}
    return {name: module for name, module in found.items() if module is not model and model not in _wrapped(module)}


def _wrapped(module: nn.Module) -> Iterator[nn.Module]:
    """What a wrapper, as torch.compile makes it, is around."""
    while isinstance(module := getattr(module, "_orig_mod", None), nn.Module):
        yield module
