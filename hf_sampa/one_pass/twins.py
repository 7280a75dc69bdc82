"""The trained weights of a model twice: one set for each half, which the modules hold while that half runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


class Twins:
    """A second parameter for each trained one, with the numbers of the first where nobody displaces it.

    Args:
        modules: in which the trained parameters are.
        params: the trained parameters, which are those of half 0.

    Attributes:
        of_half: the parameters of each half.
        holders: modules that hold trained parameters.
    """

    def __init__(self, modules: Iterable[nn.Module], params: Sequence[nn.Parameter]):
        twins = [nn.Parameter(param.data) for param in params]
        self.of_half = (list(params), twins)
        twin_of = {id(param): twin for param, twin in zip(params, twins, strict=True)}
        places = {
            (id(held), name): (module, name, param)
            for root in modules
            for module in root.modules()
            for held in [module._parameters]
            for name, param in held.items()
            if id(param) in twin_of
        }
        self.holders = list({id(module): module for module, _, _ in places.values()}.values())
        self._places = [
            (module._parameters, name, (param, twin_of[id(param)])) for module, name, param in places.values()
        ]

    def begin_alike(self) -> None:
        """Before a step: both halves are at x_t, wherever its memory is by now."""
        for param, twin in zip(*self.of_half, strict=True):
            twin.data = param.data

    # ---- What belongs to a half ----

    def leave(self, half: int) -> None:
        """Nothing to remember: the two sets are always there."""

    def enter(self, half: int) -> None:
        """Let the modules hold the parameters of `half`."""
        for held, name, of_half in self._places:
            held[name] = of_half[half]
