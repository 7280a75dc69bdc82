"""What forward changes besides its outputs: running statistics, queues, teachers that follow the weights.

A step runs forward several times, for one update batch. What that changes in buffers, saved or not, and in parameters that
are not trained is taken from one pass per update batch, the one whose loss is reported, and is the same on all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import Exchange
from .fingerprints import fingerprint, fingerprint_of_bits, fingerprint_of_print
from .tensors_of import SMALL, Moment, Place, TensorsOf


LITTLE = 2**26  # bytes, which are there for a copy in any case
TRIAL_PASSES = 6  # the three of a rehearsal, and three more, in which contents are compared: ``tensor.data.mul_()`` leaves no other trace


class _Kept(NamedTuple):
    """A tensor before a pass that is to be undone; `tensor` and `data` are references, `content` is a copy."""

    place: Place
    tensor: Tensor | None
    data: Tensor | None
    version: int
    content: Tensor | None

    @property
    def uncopied(self) -> bool:
        return self.tensor is not None and self.content is None


def make_room(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give buffers of `model` the shapes that they have in `saved`, so that weights can be loaded that were saved with them.

    torch loads no tensor into one of another shape, and none into a place that is still None.
    """
    modules = dict(model.named_modules())
    for name, value in saved.items():
        path, _, own = name.rpartition(".")
        buffers = modules[path]._buffers if path in modules else {}
        if own in buffers and (buffers[own] is None or buffers[own].shape != value.shape):
            device = next(model.parameters()).device if buffers[own] is None else buffers[own].device
            buffers[own] = torch.zeros_like(value, device=device)


class ForwardState:
    """Buffers and untrained parameters of some modules, and which of them forward changes.

    Args:
        modules: by name; the model's is "".
        trained: parameters that the base optimizer moves, left alone here.
        exchange: connects the processes.

    Attributes:
        moving: names of what has been seen to change.
    """

    def __init__(self, modules: Mapping[str, nn.Module], trained: Sequence[Tensor], exchange: Exchange):
        self.modules, self.exchange = dict(modules), exchange
        self._trained, self._device = {id(param) for param in trained}, trained[0].device
        self._room = max(LITTLE, sum(param.nbytes for param in trained))  # for copies in a rehearsal
        self.moving: set[str] = set()
        self._passes = 0
        self._found: list[tuple[str, nn.Module]] = []
        self._tensors: TensorsOf | None = None
        self._look_for_modules()

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return self._now().tensors

    def _now(self) -> TensorsOf:
        if self._tensors is None or not self._tensors.is_still_so():
            self._tensors = TensorsOf(self._found, self._trained)
        return self._tensors

    def _look_for_modules(self) -> None:
        """Modules may come and go, if rarely: a walk through a model takes a while, and one in each step is enough."""
        found: dict[int, tuple[str, nn.Module]] = {}
        for prefix, root in self.modules.items():
            for path, module in root.named_modules():
                start = ".".join(part for part in (prefix, path) if part)
                found.setdefault(id(module), (f"{start}." if start else "", module))
        if list(found.values()) != self._found:
            self._found, self._tensors = list(found.values()), None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around a pass: what it changes is known to be moving from then on."""
        trial = self._passes < TRIAL_PASSES
        self._passes += 1
        if trial:
            self._look_for_modules()
        before = Moment(self._now(), trial)
        try:
            yield
        finally:
            if trial:
                self._look_for_modules()
            self.moving |= Moment(self._now(), trial).unlike(before)

    @contextmanager
    def kept(self, rehearsed: bool = False) -> Iterator[list[str]]:
        """What passes within the block change is undone, but for large tensors that no pass changed before.

        Raises RuntimeError for such a tensor on a process that has no other to get it from. In a pass that is `rehearsed` it is
        undone, too, if all untrained tensors are few, or no larger than the trained ones, as they are without adapters; if not, its
        name is in the list that the block is given, once it is through.
        """
        self._look_for_modules()
        holders = {id(held) for _, module in self._found for held in (module._buffers, module._parameters)}
        now, before, late = self._now(), {}, []
        fits = rehearsed and sum(tensor.nbytes for tensor in now.tensors.values()) <= self._room
        for name, place in now.places.items():
            tensor = now.tensors.get(name)
            if tensor is None:
                before[name] = _Kept(place, None, None, 0, None)
                continue
            copied = name in self.moving or tensor.numel() <= SMALL or fits
            copy = tensor.detach().clone() if copied else None
            before[name] = _Kept(place, tensor, tensor.data, tensor._version, copy)
        known = set(self.moving)
        try:
            yield late
        finally:
            self._put_back(before, holders)
        late += [name for name in self.moving - known if name in before and before[name].uncopied]
        # Another process of a pair sends what its own pass made of it.
        if late and not rehearsed and not self.exchange.mesh.paired:
            raise RuntimeError(
                f"Expected forward to change in every pass what it changes at all, but {late[0]!r}, a buffer or frozen "
                f"parameter of {before[late[0]].tensor.numel()} entries, changed for the first time in a pass that had to be "
                "undone, after passes that left it alone. Let the model change it from its first forward pass on, or outside "
                "of forward, in a callback. The last checkpoint is not touched by this."
            )

    @torch.no_grad()
    def _put_back(self, before: dict[str, _Kept], holders: set[int]) -> None:
        for name, place in self._now().places.items():
            if name not in before and id(place.tensors) in holders:  # a module that is new is left as it is
                del place.tensors[place.name]
        for name, kept in before.items():
            if kept.uncopied:
                continue
            kept.place.tensors[kept.place.name] = kept.tensor
            if kept.tensor is None:
                continue
            if kept.tensor.data_ptr() != kept.data.data_ptr() or kept.tensor.shape != kept.data.shape:
                kept.tensor.data = kept.data
            # What never changes is not written to: autograd would take that for a change of what it keeps.
            if name in self.moving or kept.tensor._version != kept.version:
                kept.tensor.copy_(kept.content)

    # ---- Between processes, and in checkpoints ----

    def signature(self) -> int:
        """Equal on all processes where what is moving has the same names, shapes and types on all."""
        return fingerprint([[name, list(t.shape), str(t.dtype)] for name, t in sorted(self._moving().items())])

    def fingerprints(self) -> dict[str, int]:
        """Of every tensor, by name, and of what the modules print, as dropout rates; costs a pass over all of them."""
        self._look_for_modules()
        return {
            **{name: int(fingerprint_of_bits([tensor])) for name, tensor in self._now().plain.items()},
            **{f"print({name or 'model'})": fingerprint_of_print(module) for name, module in self.modules.items()},
        }

    def _moving(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors().items() if name in self.moving} if self.moving else {}

    def share(self, source: int, alike: bool) -> None:
        """Give all processes what forward left on rank `source`. A collective.

        Args:
            source: a rank that ran the pass that counts.
            alike: whether all processes have the same `signature`.
        """
        if self.exchange.mesh.world_size == 1:
            return
        if not alike:
            self._agree(source)
        moving = self._moving()
        self.exchange.broadcast([moving[name] for name in sorted(moving)], source)

    def _agree(self, source: int) -> None:
        """Make room for what is moving on any process, in the shapes that it has on rank `source`."""
        self.moving = set().union(*self.exchange.share_objects(self.moving))
        own = {name: (tensor.shape, tensor.dtype, self._is_saved(name)) for name, tensor in self._moving().items()}
        wanted, places = self.exchange.share_objects(own)[source], self._now().places
        for name in sorted(self.moving - wanted.keys()):
            self.moving.discard(name)
            if name in places:
                del places[name].tensors[places[name].name]
        for name, (shape, dtype, saved) in wanted.items():
            self._make_room(name, shape, dtype, places.get(name), saved)

    def _is_saved(self, name: str) -> bool:
        module, own = self._module_of(name)
        return own not in module._non_persistent_buffers_set

    def _make_room(
        self, name: str, shape: torch.Size, dtype: torch.dtype, place: Place | None, saved: bool = False
    ) -> None:
        tensor = place and place.get()
        if tensor is not None and (tensor.shape, tensor.dtype) == (shape, dtype):
            return
        device = tensor.device if tensor is not None else self._device
        room = torch.zeros(shape, dtype=dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            tensor.data = room
        elif place is not None:
            place.tensors[place.name] = room
        else:
            module, own = self._module_of(name)
            module.register_buffer(own, room, persistent=saved)

    def _module_of(self, name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        for prefix, root in sorted(self.modules.items(), key=lambda each: -len(each[0])):
            if not prefix or path == prefix or path.startswith(f"{prefix}."):
                return root.get_submodule(path[len(prefix) :].lstrip(".")), own
        raise KeyError(name)

    def state_dict(self) -> dict[str, Tensor]:
        """What is moving, by name."""
        return {name: tensor.detach() for name, tensor in sorted(self._moving().items())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        places = self._now().places
        for name, value in state.items():
            self._make_room(name, value.shape, value.dtype, places.get(name))
        places = self._now().places
        for name, value in state.items():
            places[name].get().copy_(value)
        self.moving |= state.keys()
