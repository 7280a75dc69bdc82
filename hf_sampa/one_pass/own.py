"""What belongs to a half, besides its trained weights: random generators, and what is kept in attributes during a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..state import GlobalState, Remembered


UNSET = object()


class Randomness:
    """The global generators of Python, numpy and torch, and others that a pass seeds.

    Args:
        device: on which passes compute.

    Attributes:
        others: those others.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.others: Sequence[Any] = ()
        self._of_all: list[GlobalState | None] = [None, None]
        self._of_others: list[Remembered | None] = [None, None]

    def leave(self, half: int) -> None:
        self._of_all[half] = GlobalState(self.device)
        self._of_others[half] = Remembered(*self.others) if self.others else None

    def enter(self, half: int) -> None:
        self._of_all[half].restore()
        if self._of_others[half]:
            self._of_others[half].put_back()

    def pass_dice(self, half: int, other: int) -> None:
        """What dropout draws from changes hands, from `half` to `other`; the other generators take ten times as long."""
        self._of_all[half].note_device()
        self._of_all[other].restore_device()


class Attributes:
    """Some attributes of some objects.

    Args:
        places: the objects, each with a name.
    """

    def __init__(self, *places: tuple[Any, str]):
        self._places = places
        self._state: list[list[Any]] = [[], []]

    def leave(self, half: int) -> None:
        self._state[half] = [vars(owner).get(name, UNSET) for owner, name in self._places]

    def enter(self, half: int) -> None:
        for (owner, name), value in zip(self._places, self._state[half], strict=True):
            if value is UNSET:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value


class Views:
    """What somebody else keeps, who can tell how to bring it back.

    Args:
        remember: gives what brings back what there is at that moment.
    """

    def __init__(self, remember: Callable[[], Callable[[], None]]):
        self._remember = remember
        self._put_back: list[Callable[[], None]] = [lambda: None] * 2

    def leave(self, half: int) -> None:
        self._put_back[half] = self._remember()

    def enter(self, half: int) -> None:
        self._put_back[half]()
