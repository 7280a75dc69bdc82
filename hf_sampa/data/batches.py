"""One stream of update batches B_0, B_1, ... that both roles read, the same on every process and after every resume."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import skip_first_batches
from torch import Tensor

from ..state import FirstState, OwnGenerators, derive_seed, fingerprint, own_generators
from .loaders import is_seeded, parts_of
from .seeded_data import HALVES, INDICES


@dataclass
class MicroBatch:
    """What one forward and backward pass reads.

    Attributes:
        inputs: as the collator made them.
        update: t, the index of the update batch it belongs to.
        position: its place in the update batch, or that and the place in the micro-batch that it is a piece of.
        epoch: of the stream, from 0.
        num_items: labels that count, as `Trainer` counts them; None where it cannot.
        share: weight of its mean loss in the update batch's; set before the pass. A tensor ``()`` with several replicas.
        indices: ``(n,)``, the samples' places in the dataset, where a variant needs them.
        halves: what the collator made of each half of its samples, where processes share batches out and there are several.
        logits: ``(n, classes)``, what the model last said of the samples, where a variant needs it.
        loss: ``()``, the trainer's own, which came with these logits.
        teacher: ``(n, classes)``, what a variant's teacher says of them.
        slope: of the trainer's loss with respect to the logits, like them, in the pass for g_t, where a variant keeps it.
    """

    inputs: Any
    update: int
    position: int | tuple[int, int]
    epoch: int = 0
    num_items: Tensor | None = None
    share: float | Tensor | None = None
    indices: Tensor | None = None
    halves: list[Any] | None = None
    logits: Tensor | None = None
    loss: Tensor | None = None
    teacher: Tensor | None = None
    slope: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return count_samples(self.inputs)

    @property
    def counts(self) -> bool:
        """Whether a label of it counts, as far as its share says."""
        return not isinstance(self.share, float) or bool(self.share)

    def narrowed(self, chosen: Tensor, piece: int | None = None) -> MicroBatch:
        """Those of its samples that `chosen` ``(n,)`` says, yet without a share; as its `piece`-th piece, if it has several."""
        places = chosen.nonzero()[:, 0]

        def part_of(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == len(chosen):
                return value[places.to(value.device)]
            if isinstance(value, list) and len(value) == len(chosen):
                return [value[place] for place in places.tolist()]
            return value

        inputs = {name: part_of(value) for name, value in self.inputs.items()}
        position = self.position if piece is None else (self.position, piece)
        return MicroBatch(
            inputs, self.update, position, self.epoch, indices=part_of(self.indices), logits=part_of(self.logits)
        )

    def count_items(self) -> float:
        """Labels that count or, without labels, samples: what a mean loss is taken to be the mean of."""
        labels = self.inputs.get("labels") if isinstance(self.inputs, Mapping) else None
        if isinstance(labels, Tensor):
            return float((labels != -100).sum())
        return float(count_samples(self.inputs) or 1)

    def own_inputs(self, device: torch.device) -> Any:
        """A copy of the inputs, but for tensors that will be copied on their way to `device`."""
        return _copied(self.inputs, device)


@dataclass
class UpdateBatch:
    """B_t as one replica sees it.

    Attributes:
        micro_batches: at least one.
        epoch: of the stream, from 0.
        start: how many micro-batches of the epoch come before it.
    """

    micro_batches: list[MicroBatch]
    epoch: int
    start: int
    fingerprint: int = field(init=False)

    def __post_init__(self):
        self.fingerprint = fingerprint([micro_batch.inputs for micro_batch in self.micro_batches])

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    @property
    def update(self) -> int:
        """t, its index among the run's update batches."""
        return self.micro_batches[0].update


class Place(NamedTuple):
    """Where the data go on: the next update batch."""

    epoch: int
    start: int  # micro-batches of the epoch that come before it
    fingerprint: int | None = None  # this replica's; None where it has not been read yet


def count_samples(inputs: Any) -> int:
    """Number of samples in what a collator made: rows of the first tensor in it, or entries of a list of samples; 0 of nothing."""
    if isinstance(inputs, Tensor | np.ndarray):
        return len(inputs) if inputs.ndim else 0
    if isinstance(inputs, Mapping):
        return next((count for count in map(count_samples, inputs.values()) if count), 0)
    if isinstance(inputs, list | tuple):
        columns = inputs and all(isinstance(each, Tensor | np.ndarray) and each.ndim for each in inputs)
        if columns and len({len(each) for each in inputs}) == 1:
            return len(inputs[0])
        nested = [each for each in inputs if isinstance(each, list | tuple)]
        # A tuple is made of columns, as (features, labels); a list of dicts, texts or images, of samples.
        if isinstance(inputs, tuple) or len(nested) == len(inputs):
            return next((count for count in map(count_samples, inputs) if count), 0)
        return len(inputs)
    return count_samples(vars(inputs)) if hasattr(inputs, "__dict__") else 0


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.device == device else value
    if isinstance(value, Mapping):
        copied = copy.copy(value)  # its class, and what else an encoding or a defaultdict has
        for key in value:
            copied[key] = _copied(value[key], device)
        return copied
    if isinstance(value, list | tuple):
        items = [_copied(each, device) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, str | bytes | int | float | None):
        return value
    try:
        return copy.deepcopy(value)
    except TypeError:  # what holds a lock or a file
        return value


class _Counted:
    """Iterator over what a loader gives, and how many batches of its epoch it has given."""

    def __init__(self, loader: Iterable, count: int):
        self.iterator, self.count = iter(loader), count

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.iterator)
        self.count += 1
        return batch


class UpdateStream:
    """Update batches, epoch after epoch, one of them visible ahead, until the data are over, if ever.

    Args:
        loader: from `seeded_loader`, or of one's own.
        seed: of the run's data; equal on all processes.
        accumulation: micro-batches in an update batch; the last of an epoch may have fewer.
        epoch: where to begin, and
        start: how many of its micro-batches to leave out.
        update: t of the first batch.
        read: given an iterator over micro-batches and how many are wanted, returns those of an update batch; fewer, or none,
            where there are no more.
    """

    def __init__(
        self,
        loader: Iterable,
        *,
        seed: int,
        accumulation: int,
        epoch: int,
        start: int,
        update: int,
        read: Callable[[Iterator, int], list[Any]] = lambda iterator, count: list(islice(iterator, count)),
    ):
        self.loader, self.seed, self.accumulation, self._read_inputs = loader, seed, accumulation, read
        self._update, self._has_read, self._end = update, bool(epoch or start), (epoch, start)
        own = {id(each): each for part in parts_of(loader) for each in own_generators(part)}
        self._kept_generators = [FirstState(generator) for generator in own.values()]
        self._begin(epoch, start)
        self._ahead = self._read()

    def peek(self) -> UpdateBatch | None:
        """The batch that `advance` will return next; None where the data are over."""
        return self._ahead

    def advance(self) -> UpdateBatch:
        """Next batch, of which there must be one. Raises ValueError where there never was one."""
        batch, self._ahead = self._ahead, self._read()
        return batch

    def leave_epoch(self, update: int) -> None:
        """Go on with the next epoch's first batch as B_t of t = `update`, leaving out what is left of this one."""
        self._update = update
        self._begin(self._ahead.epoch + bool(self._ahead.start), 0)
        self._ahead = self._read()

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and micro-batches of it, before the batch that comes next."""
        return (self._ahead.epoch, self._ahead.start) if self._ahead else self._end

    def _begin(self, epoch: int, start: int) -> None:
        self._epoch, self._position = epoch, start
        self._generators = OwnGenerators(derive_seed(self.seed, "epoch", epoch))
        for part in parts_of(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for place, kept in enumerate(self._kept_generators):
            kept.begin_epoch(epoch, derive_seed(self.seed, "generator", place, epoch))
        skips = is_seeded(self.loader)  # by indices, without reading
        with self._generators.lent():
            left = skip_first_batches(self.loader, start) if skips and start else self.loader
            self._iterator = _Counted(left, start if skips else 0)
            for _ in range(0 if skips else start):
                next(self._iterator, None)

    def _read(self) -> UpdateBatch | None:
        inputs = self._read_group()
        if not inputs:
            if self._position == 0:
                self._check_has_read()
                return None  # what can be read once is over
            self._end = self._epoch, self._position
            self._begin(self._epoch + 1, 0)
            return self._read()
        self._has_read = True
        micro_batches = [
            MicroBatch(
                each,
                self._update,
                position,
                self._epoch,
                indices=each.pop(INDICES, None) if isinstance(each, MutableMapping) else None,
                halves=each.pop(HALVES, None) if isinstance(each, MutableMapping) else None,
            )
            for position, each in enumerate(inputs)
        ]
        batch = UpdateBatch(micro_batches, self._epoch, self._position)
        self._position = self._iterator.count
        self._update += 1
        return batch

    def _check_has_read(self) -> None:
        if not self._has_read:
            raise ValueError(
                "Expected at least one batch in the first epoch of the training data, but got none. The dataset is empty, "
                "smaller than one batch with dataloader_drop_last=True, or can be read only once and was read before."
            )

    def _read_group(self) -> list[Any]:
        with self._generators.lent():
            before = self._iterator.count
            inputs = self._read_inputs(self._iterator, self.accumulation)
            while not inputs and self._iterator.count > before:  # what was read was all left out
                before = self._iterator.count
                inputs = self._read_inputs(self._iterator, self.accumulation)
            return inputs
