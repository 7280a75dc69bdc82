"""What objects, and all that they hold, are at one moment; and making them that again.

For other people's code that has to run and may leave nothing behind, a step of an optimizer that only looks ahead, say.
"""

from __future__ import annotations

import io
import logging
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import cache
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset


Kind = TypeVar("Kind")
PutBack = Callable[[], None]
ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
# Code, models and data are large or belong to others; logs, files and threads go on meanwhile.
LEFT = (
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType),
    *(nn.Module, Dataset, DataLoader),
    *(logging.Logger, logging.Handler, io.IOBase, threading.Thread),
)
UNSET = object()


class Remembered:
    """What some objects are now, so that they can be put back to it, whatever is done to them in between.

    Looked into are dicts, lists, deques, sets, tuples, attributes and ``__slots__`` of objects, and what those hold in turn;
    tensors, arrays and random generators are copied, which is what this costs. Everything is put back in place: objects
    stay the same ones, and those that are held in several places stay shared. What is in closures or compiled code is
    not seen, and neither are the keys of dicts and what `LEFT` names.

    Args:
        roots: where to begin.
        leave: given an object, whether to keep it as it is, with all that only it holds.
    """

    def __init__(self, *roots: Any, leave: Callable[[Any], bool] = lambda value: False):
        self._seen: dict[int, Any] = {}  # holds the objects, so that no other one comes to have their id
        self._steps: list[PutBack] = []
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            if type(value) in ATOMS or id(value) in self._seen or isinstance(value, LEFT) or leave(value):
                continue
            self._seen[id(value)] = value
            for put_back, held in _parts(value):
                self._steps.append(put_back)
                waiting.extend(held)

    def found(self, kind: type[Kind]) -> list[Kind]:
        """The objects of one class among those that are remembered."""
        return [value for value in self._seen.values() if isinstance(value, kind)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything what it was, as often as you like."""
        for step in self._steps:
            step()


Part = tuple[PutBack, Iterable[Any]]  # what puts something back, and what else it holds


def _parts(value: Any) -> Iterable[Part]:
    """What there is to remember of one object: as one of `KINDS`, and as one with attributes."""
    for kind, remember in KINDS.items():
        if isinstance(value, kind):
            yield remember(value)
            break
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield _nothing, [attributes]
    for slot in slots_of(type(value)):
        yield _slot(value, slot)


@cache
def slots_of(kind: type) -> list[MemberDescriptorType]:
    """What ``__slots__`` of a class and of its bases made."""
    members = [member for cls in kind.__mro__ if "__slots__" in vars(cls) for member in vars(cls).values()]
    return [member for member in members if isinstance(member, MemberDescriptorType)]


def _nothing() -> None:
    """What never changes needs no putting back."""


def _tensor(tensor: Tensor) -> Part:
    if is_traceable_wrapper_subclass(tensor):  # it has no numbers but those of other tensors, and may allow no copies
        return _nothing, [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    # `.data` is the memory as it is now, whatever the tensor is pointed at later; autograd need not know of writes to it
    # that bring back what was there.
    memory = tensor.data
    own = _without_repeats(memory)
    content = own.clone()

    def put_back() -> None:
        tensor.data = memory
        # What has not changed may be memory that cannot be written to, a mapped file.
        if own.device.type != "cpu" or own.layout is not torch.strided or not torch.equal(own, content):
            own.copy_(content)

    return put_back, ()


def _without_repeats(memory: Tensor) -> Tensor:
    """Every number of an expanded tensor once: it cannot be written to as a whole."""
    if memory.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(memory.shape, memory.stride(), strict=True)):
            memory = memory.narrow(dim, 0, 1) if size > 1 and stride == 0 else memory
    return memory


def _array(array: np.ndarray) -> Part:
    content = array.copy()
    put_back = (lambda: np.copyto(array, content)) if array.flags.writeable else _nothing
    return put_back, list(array.flat) if array.dtype == object else ()


def _dict(mapping: dict) -> Part:
    # Methods of the base: those of a subclass may do more than they say, or refuse.
    base = OrderedDict if isinstance(mapping, OrderedDict) else dict
    items = list(base.items(mapping))

    def put_back() -> None:
        now = list(base.items(mapping))
        if len(now) == len(items) and all(a is c and b is d for (a, b), (c, d) in zip(now, items, strict=True)):
            return  # not even for a moment empty: other threads may be reading
        base.clear(mapping)
        for key, item in items:
            base.__setitem__(mapping, key, item)

    return put_back, [item for _, item in items]


def _list(values: list) -> Part:
    content = list(values)
    return lambda: list.__setitem__(values, slice(None), content), content


def _deque(values: deque) -> Part:
    content = list(values)

    def put_back() -> None:
        deque.clear(values)
        deque.extend(values, content)

    return put_back, content


def _set(values: set) -> Part:
    content = set(values)

    def put_back() -> None:
        if values != content:  # filled anew it may come to have another order
            set.clear(values)
            set.update(values, content)

    return put_back, content


def _generator(read: Callable[[Any], Any], write: Callable[[Any, Any], None]) -> Callable[[Any], Part]:
    def remember(generator: Any) -> Part:
        state = read(generator)
        return lambda: write(generator, state), ()

    return remember


def _slot(value: Any, slot: MemberDescriptorType) -> Part:
    def read() -> Any:
        try:
            return slot.__get__(value)
        except AttributeError:
            return UNSET

    before = read()

    def put_back() -> None:
        if before is not UNSET:
            slot.__set__(value, before)
        elif read() is not UNSET:
            slot.__delete__(value)

    return put_back, [before]


def _set_bits(generator: np.random.BitGenerator, state: Any) -> None:
    generator.state = state


# The first that fits.
KINDS: dict[type | tuple[type, ...], Callable[[Any], Part]] = {
    Tensor: _tensor,
    np.ndarray: _array,
    dict: _dict,
    list: _list,
    (tuple, frozenset): lambda values: (_nothing, values),
    set: _set,
    deque: _deque,
    torch.Generator: _generator(torch.Generator.get_state, torch.Generator.set_state),
    random.SystemRandom: lambda generator: (_nothing, ()),  # has no state
    random.Random: _generator(random.Random.getstate, random.Random.setstate),
    np.random.RandomState: _generator(np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: lambda generator: (_nothing, [generator.bit_generator]),
    np.random.BitGenerator: _generator(lambda generator: generator.state, _set_bits),
}
