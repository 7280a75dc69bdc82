"""The buffers and untrained parameters of modules: where they are, and whether a pass changed them.

Every pass is looked at twice, and a model has hundreds of them, which are the same ones nearly always: what was found last is used
again as long as the modules hold the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .fingerprints import fingerprint_of_bits


# Up to so many entries a tensor is copied before every pass that is undone, whether it was ever seen to change or not.
SMALL = 2**16
# Types that every torch puts behind one another; of others it is told that they are bytes.
USUAL = {
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
}


class Place(NamedTuple):
    """Where a module keeps a tensor: among its buffers or among its parameters."""

    tensors: dict[str, Tensor | None]
    name: str

    def get(self) -> Tensor | None:
        return self.tensors.get(self.name)


class TensorsOf:
    """The tensors that some modules hold, found anew where one of them has got, lost or replaced any.

    Args:
        modules: with what their tensors' names begin with.
        left_out: ids of those that are left out.

    Attributes:
        places: by name; those of tensors that are yet to come, whose value is None, too.
        tensors: by name, those that are there.
        plain: the same without quantized weights, which are several tensors in one, at no address.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], left_out: set[int]):
        self._modules = list(modules)
        held = self._held()
        self._seen = _Contents(held)
        self.places = {
            f"{start}{name}": Place(tensors, name)
            for start, tensors in held
            for name, tensor in tensors.items()
            if id(tensor) not in left_out
        }
        found = {name: place.get() for name, place in self.places.items()}
        self.tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        self.plain = {
            name: tensor for name, tensor in self.tensors.items() if not is_traceable_wrapper_subclass(tensor)
        }
        self._small: tuple[list, dict[torch.dtype, dict[str, Tensor]]] | None = None

    def _held(self) -> list[tuple[str, dict[str, Tensor | None]]]:
        return [
            (start, tensors)
            for start, module in self._modules
            for tensors in (module._buffers, module._parameters)
            if tensors
        ]

    def is_still_so(self) -> bool:
        """Whether a walk would find the same."""
        return _Contents(self._held()).same_as(self._seen)

    def small(self, where: list) -> dict[torch.dtype, dict[str, Tensor]]:
        """The small tensors on a CPU, by type; `where` they are, by address and shape. On other devices reading them would make the host wait."""
        if self._small is None or self._small[0] != where:
            small: dict[torch.dtype, dict[str, Tensor]] = {}
            for name, tensor in self.plain.items():
                if tensor.device.type == "cpu" and 0 < tensor.numel() <= SMALL:
                    small.setdefault(tensor.dtype, {})[name] = tensor
            self._small = (where, small)
        return self._small[1]


class _Contents:
    """What the dicts of modules hold at one moment."""

    def __init__(self, held: Sequence[tuple[str, dict[str, Any]]]):
        self._dicts = [each for _, each in held]
        self._names = [name for each in self._dicts for name in each]
        self._values = [value for each in self._dicts for value in each.values()]
        self._lengths = list(map(len, self._dicts))

    def same_as(self, other: _Contents) -> bool:
        return (
            self._lengths == other._lengths
            and self._names == other._names
            and all(map(is_, self._dicts, other._dicts))
            and all(map(is_, self._values, other._values))
        )


class Moment:
    """What tells, later, that one of `found` was changed or replaced.

    Args:
        found: the tensors, as they are now.
        with_content: whether all contents are looked at, and not those of small ones on a CPU alone: ``tensor.data.mul_()`` leaves no other
            trace.
    """

    @torch.no_grad()
    def __init__(self, found: TensorsOf, with_content: bool):
        self._found = found
        self._versions = [tensor._version for tensor in found.tensors.values()]
        self._shapes = [tensor.shape for tensor in found.tensors.values()]
        self._addresses = [tensor.data_ptr() for tensor in found.plain.values()]
        self._contents: list[int] = []
        if with_content and found.plain:
            prints = [fingerprint_of_bits([tensor]).cpu() for tensor in found.plain.values()]
            self._contents = torch.stack(prints).tolist()
        self._small = found.small([*self._addresses, *self._shapes])
        self._bits = [_bits_of(dtype, list(tensors.values())) for dtype, tensors in self._small.items()]

    def unlike(self, before: Moment) -> set[str]:
        """Names of the tensors that are other ones than `before`, or new."""
        if self._same_as(before):
            return set()
        now, then = self._by_name(), before._by_name()
        small, former = self._small_by_name(), before._small_by_name()
        others = {name for name, bits in small.items() if name in former and not torch.equal(bits, former[name])}
        return {name for name in now if now[name] != then.get(name)} | others

    def _same_as(self, before: Moment) -> bool:
        return (
            self._found is before._found
            and self._versions == before._versions
            and self._addresses == before._addresses
            and self._shapes == before._shapes
            and self._contents == before._contents
            and all(map(torch.equal, self._bits, before._bits))
        )

    def _by_name(self) -> dict[str, tuple]:
        tensors, plain = self._found.tensors, self._found.plain
        addresses = dict(zip(plain, self._addresses, strict=True))
        contents = dict(zip(plain, self._contents, strict=True)) if self._contents else {}
        return {
            name: (id(tensor), version, shape, addresses.get(name), contents.get(name))
            for (name, tensor), version, shape in zip(tensors.items(), self._versions, self._shapes, strict=True)
        }

    def _small_by_name(self) -> dict[str, Tensor]:
        found = {}
        for tensors, bits in zip(self._small.values(), self._bits, strict=True):
            found |= dict(zip(tensors, bits.split([tensor.nbytes for tensor in tensors.values()]), strict=True))
        return found


def _bits_of(dtype: torch.dtype, tensors: list[Tensor]) -> Tensor:
    """Copies of the bits of tensors of one type, behind one another."""
    if dtype not in USUAL:
        tensors = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    bits = _flatten_dense_tensors(tensors).view(torch.uint8)
    return bits.clone() if len(tensors) == 1 else bits  # one by itself stays in its own memory
