"""Two computations that take turns in one process, and meet: what both want computed with the same numbers is computed for both at once.

Each has a thread of its own, and one of them runs at a time, so that what belongs to a half (random generators, the trained
weights that a module holds) changes places when they do. Where one comes to a meeting place, it waits for the other; who comes second
computes for both and goes on. Order and results depend on nothing but the two computations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


One, Other = TypeVar("One"), TypeVar("Other")


class Own(Protocol):
    """Something that each half has a state of, and that is held in one place."""

    def leave(self, half: int) -> None:
        """Remember the state of `half`, which is about to wait."""

    def enter(self, half: int) -> None:
        """Bring back the state of `half`."""


class Stopped(Exception):
    """The other half was interrupted, so that this one's result is of no use."""


@dataclass
class _Waiting:
    place: Hashable
    work: Any
    answer: Any = None


class Halves:
    """Runs pairs of computations.

    Args:
        device: on which they compute.

    Attributes:
        current: 0 or 1 within a half; None outside, and within what is computed for both.
        running: the half whose turn it is.
        meetings: how often the two have met.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.meetings, self.running = 0, 0
        self._local = threading.local()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf_sampa half")
        self._turns = [_taken(), _taken()]  # locks, which take a tenth of a semaphore's time
        self._own: Sequence[Own] = ()
        self._alive = [False, False]
        self._waiting: _Waiting | None = None
        self._stopping = False

    @property
    def current(self) -> int | None:
        return getattr(self._local, "half", None)

    def close(self) -> None:
        """End the second half's thread."""
        self._thread.shutdown()

    def run(self, first: Callable[[], One], second: Callable[[], Other], own: Sequence[Own]) -> tuple[One, Other]:
        """The results of both; `first` runs in the thread of the caller, and begins.

        Args:
            first, second: what is computed.
            own: what belongs to each half.

        Raises what one of them raises, once the other one has come to its end or to a meeting place.
        """
        self._own, self._alive, self._waiting, self._stopping = own, [True, True], None, False
        for each in own:
            each.leave(0)
            each.leave(1)
        other = self._thread.submit(copy_context().run, self._half, 1, second)
        result = None
        try:
            result = self._half(0, first)
        except Stopped:
            pass  # the reason is the other one's
        finally:
            wait([other])
            self._enter(0)
        return result, other.result()

    def meet(self, place: Hashable, work: Any, both: Callable[[Any, Any], tuple[Any, Any] | None]) -> Any:
        """This half's part of what comes out of `both`, given the `work` of the first half and of the second at this `place`.

        None where the two do not meet: the other half has ended or passes by, or `both` gives nothing.
        """
        half = self.current
        if half is None or not self._alive[1 - half]:
            return None
        waiting = self._waiting
        if waiting is None:
            waiting = self._waiting = _Waiting(place, work)
            self._switch(half)
            if self._waiting is waiting:
                self._waiting = None
            return waiting.answer
        if waiting.place != place:
            return None
        self._waiting = None
        self._local.half = None  # within, nothing meets
        try:
            answers = both(work, waiting.work) if half == 0 else both(waiting.work, work)
        finally:
            self._local.half = half
        if answers is None:
            return None
        self.meetings += 1
        waiting.answer = answers[1 - half]
        return answers[half]

    def _half(self, half: int, compute: Callable[[], Any]) -> Any:
        if half == 1:
            self._turns[1].acquire()
            if self._stopping:
                raise Stopped
            if self.device.type != "cpu":
                torch.get_device_module(self.device).set_device(self.device)
        self._enter(half)
        self._local.half = half
        try:
            # Backward stays in this thread: one that all halves share would wait for itself.
            with torch.autograd.set_multithreading_enabled(False):
                return compute()
        except BaseException:
            self._stopping = True
            raise
        finally:
            for each in self._own:
                each.leave(half)
            self._local.half, self._alive[half] = None, False
            if self._alive[1 - half]:
                self._turns[1 - half].release()

    def _switch(self, half: int) -> None:
        """Let the other half run until it waits or ends."""
        for each in self._own:
            each.leave(half)
        self._turns[1 - half].release()
        try:
            self._turns[half].acquire()
        except BaseException:  # a signal, while the other half runs
            self._stopping = True
            self._turns[half].acquire()
            self._enter(half)
            raise
        self._enter(half)
        if self._stopping:
            raise Stopped

    def _enter(self, half: int) -> None:
        self.running = half
        for each in self._own:
            each.enter(half)


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
