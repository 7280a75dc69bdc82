"""Randomness that belongs to the batch, not to the process: derived seeds, and global generators lent and put back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .undo import Remembered


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on all `parts` and on nothing else: not on the process, nor on Python's hash."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_globals(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, numpy, torch on the CPU and, where given, torch on `device`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would seed every accelerator too.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class GlobalState:
    """The state of the global generators at one moment."""

    def __init__(self, device: torch.device | None = None):
        self.device = device if device is not None and device.type != "cpu" else None
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.on_device = torch.get_device_module(self.device).get_rng_state(self.device) if self.device else None

    def restore(self) -> None:
        """Put the generators back to that moment."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.device:
            self.restore_device()

    def note_device(self) -> None:
        """Take what torch's generator on the device is by now; of the CPU, where there is no other."""
        if self.device:
            self.on_device = torch.get_device_module(self.device).get_rng_state(self.device)
        else:
            self.torch = torch.get_rng_state()

    def restore_device(self) -> None:
        """Put that one back, and no other."""
        if self.device:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)
        else:
            torch.set_rng_state(self.torch)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block the global generators start from `seed`; afterwards they are as they were before."""
    before = GlobalState(device)
    seed_globals(seed, device)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def unseeded() -> Iterator[None]:
    """What the block does to the global generators on the CPU is undone."""
    before = GlobalState()
    try:
        yield
    finally:
        before.restore()


MOST_PARTS = 32  # of a list that are looked into: loaders or transforms are few, samples are many
OwnGenerator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


_plain: set[type] = set()  # classes of values that are no generators


def generators_in(holders: Iterable[Any]) -> list[OwnGenerator]:
    """Generators among the attributes of objects, as many modules are, whose attributes are of few classes."""
    found = []
    for attributes in map(vars, holders):
        if not _plain.issuperset(map(type, attributes.values())):
            found += [value for value in attributes.values() if isinstance(value, OwnGenerator)]
            _plain.update(kind for kind in map(type, attributes.values()) if not issubclass(kind, OwnGenerator))
    return found


def own_generators(owner: Any, depth: int = 3) -> list[OwnGenerator]:
    """Generators that a collator or dataset, or a part of it, keeps as attributes.

    `transformers`' collators make theirs only when they are first called, each worker process its own: they are asked to make
    it now, so that the first batch is drawn from the same state as it is after a resume.
    """
    if isinstance(owner, OwnGenerator):
        return [owner]
    owner = getattr(owner, "__self__", owner)  # of a method
    if isinstance(owner, partial):
        inside = [owner.func, *owner.args, *owner.keywords.values()]
    elif isinstance(owner, list | tuple):
        inside = list(owner[:MOST_PARTS])
    else:
        inside = [] if isinstance(owner, type | Tensor) else list(getattr(owner, "__dict__", {}).values())
    if type(owner).__module__.startswith("datasets."):
        # Its streams copy their generators, and begin each epoch as ``set_epoch`` says.
        inside = [value for value in inside if not isinstance(value, OwnGenerator)]
    if depth == 0 or not inside:
        return []
    if hasattr(owner, "create_rng") and owner.seed is not None and owner.generator is None:
        owner.create_rng()
        return own_generators(owner, depth)
    return [generator for value in inside for generator in own_generators(value, depth - 1)]


def seed_all(seed: int, own: Iterable[OwnGenerator]) -> None:
    """Seed the global generators on the CPU, and each of `own`."""
    seed_globals(seed)
    for generator in own:
        seed_own(seed, generator)


def seed_own(seed: int, generator: OwnGenerator) -> None:
    """Seed one generator of somebody's."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


class FirstState:
    """A generator that a loader or sampler keeps, begun anew in every epoch, so that a run can go on in any of them."""

    def __init__(self, generator: OwnGenerator):
        self.generator, self._first = generator, Remembered(generator)
        self._first_seed = generator.initial_seed() if isinstance(generator, torch.Generator) else None

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """The first epoch is the one that plain Trainer would see; others begin from a seed."""
        if self._first_seed is not None:
            seed_own(derive_seed(self._first_seed, epoch) if epoch else self._first_seed, self.generator)
        elif epoch == 0:
            self._first.put_back()
        else:
            seed_own(seed, self.generator)


class OwnGenerators:
    """Global generators of one consumer: each `lent` block goes on where its last one ended."""

    def __init__(self, seed: int):
        with seeded(seed):
            self._state = GlobalState()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Run the block on this consumer's generators, and put everyone else's back."""
        before = GlobalState()
        self._state.restore()
        try:
            yield
        finally:
            self._state = GlobalState()
            before.restore()
