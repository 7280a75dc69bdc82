"""One stream of update batches B_0, B_1, ... that both roles read, the same on every process and after every resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.utils import find_batch_size
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .loaders import parts_of
from .randomness import INDICES, OwnGenerators, derive_seed


# Enough to tell any two batches apart, little enough for a batch of images to cost nothing.
FINGERPRINT_ENTRIES = 4096


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
        logits: ``(n, classes)``, what the model last said of the samples, where a variant needs it.
        loss: ``()``, the trainer's own, which came with these logits.
        teacher: ``(n, classes)``, what a variant's teacher says of them.
    """

    inputs: dict[str, Any]
    update: int
    position: int | tuple[int, int]
    epoch: int = 0
    num_items: Tensor | None = None
    share: float | Tensor | None = None
    indices: Tensor | None = None
    logits: Tensor | None = None
    loss: Tensor | None = None
    teacher: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return find_batch_size(self.inputs) or 0

    def narrowed(self, chosen: Tensor, piece: int | None = None) -> MicroBatch:
        """Those of its samples that `chosen` ``(n,)`` says, yet without a share; as its `piece`-th piece, if it has more."""
        places = chosen.nonzero()[:, 0]

        def part_of(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == len(chosen):
                return value[places.to(value.device)]
            if isinstance(value, list) and len(value) == len(chosen):
                return [value[place] for place in places.tolist()]
            return value

        inputs = {name: part_of(value) for name, value in self.inputs.items()}
        return MicroBatch(
            inputs, self.update, self.position, self.epoch, indices=part_of(self.indices), logits=part_of(self.logits)
        )

    def count_items(self) -> float:
        """Labels that count or, without labels, samples: what a mean loss is taken to be the mean of."""
        labels = self.inputs.get("labels")
        if isinstance(labels, Tensor):
            return float((labels != -100).sum())
        return float(find_batch_size(self.inputs) or 1)


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


class UpdateStream:
    """Update batches, epoch after epoch without end, one of them visible ahead.

    Args:
        loader: from `seeded_loader`.
        seed: of the run's data; equal on all processes.
        accumulation: micro-batches in an update batch; the last of an epoch may have fewer.
        epoch: where to begin, and
        start: how many of its micro-batches to leave out.
        update: t of the first batch.
    """

    def __init__(self, loader: DataLoader, *, seed: int, accumulation: int, epoch: int, start: int, update: int):
        self.loader, self.seed, self.accumulation = loader, seed, accumulation
        self._update = update
        generators = [part.generator for part in parts_of(loader) if _keeps_generator(part)]
        self._kept_generators = [(generator, generator.initial_seed()) for generator in generators]
        self._begin(epoch, start)
        self._ahead = self._read()

    def peek(self) -> UpdateBatch:
        """The batch that `advance` will return next."""
        return self._ahead

    def advance(self) -> UpdateBatch:
        """Next batch. Raises ValueError where an epoch turns out to be empty."""
        batch, self._ahead = self._ahead, self._read()
        return batch

    def leave_epoch(self) -> None:
        """Go on with the next epoch's first batch, leaving out what is left of this one."""
        self._update = self._ahead.micro_batches[0].update
        self._begin(self._ahead.epoch + 1, 0)
        self._ahead = self._read()

    def _begin(self, epoch: int, start: int) -> None:
        self._epoch, self._position = epoch, start
        self._generators = OwnGenerators(derive_seed(self.seed, "epoch", epoch))
        for part in parts_of(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for generator, initial_seed in self._kept_generators:
            # The first epoch is the one that plain Trainer would see.
            generator.manual_seed(derive_seed(initial_seed, epoch) if epoch else initial_seed)
        sampled = not isinstance(self.loader.dataset, IterableDataset) and self.loader.batch_sampler is not None
        with self._generators.lent():
            self._iterator = iter(skip_first_batches(self.loader, start) if sampled and start else self.loader)
            for _ in range(0 if sampled else start):
                next(self._iterator, None)

    def _read(self) -> UpdateBatch:
        inputs = self._read_group()
        if not inputs:
            if self._position == 0:
                raise ValueError(
                    f"Expected at least one batch in epoch {self._epoch} of the training data, but got none. The "
                    "dataset is empty, smaller than one batch with dataloader_drop_last=True, or can be read only once "
                    "and is over: one update batch is always read ahead, so max_steps needs one more."
                )
            self._begin(self._epoch + 1, 0)
            return self._read()
        micro_batches = [
            MicroBatch(
                each,
                self._update,
                position,
                self._epoch,
                indices=each.pop(INDICES, None) if isinstance(each, MutableMapping) else None,
            )
            for position, each in enumerate(inputs)
        ]
        batch = UpdateBatch(micro_batches, self._epoch, self._position)
        self._position += len(inputs)
        self._update += 1
        return batch

    def _read_group(self) -> list[dict]:
        inputs = []
        with self._generators.lent():
            while len(inputs) < self.accumulation and (batch := next(self._iterator, None)) is not None:
                inputs.append(batch)
        return inputs


def _keeps_generator(part: Any) -> bool:
    return isinstance(getattr(part, "generator", None), torch.Generator)


def fingerprint(batch: Any) -> int:
    """A number in [0, 2**63) that two processes agree on when, and in practice only when, their batches are equal.

    Covers names, types, shapes and up to `FINGERPRINT_ENTRIES` evenly spread entries of each tensor.
    """
    digest = hashlib.blake2b(digest_size=8)
    _update_digest(digest, batch)
    return int.from_bytes(digest.digest(), "little") >> 1


def _update_digest(digest, value: Any) -> None:
    if isinstance(value, Tensor) and value.is_sparse:
        value = (tuple(value.shape), value.coalesce().indices(), value.coalesce().values())
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.frombuffer(bytearray(np.ascontiguousarray(value).tobytes() or b"\0"), dtype=torch.uint8)
    if isinstance(value, Tensor):
        entries = value.detach().reshape(-1)
        entries = entries[:: max(1, -(-entries.numel() // FINGERPRINT_ENTRIES))].contiguous().cpu()
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(entries.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(repr(key).encode())
            _update_digest(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(repr(len(value)).encode())
        for item in value:
            _update_digest(digest, item)
    else:
        # The repr of other objects may name an address in memory.
        plain = isinstance(value, str | bytes | int | float | None)
        digest.update((repr(value) if plain else type(value).__qualname__).encode())
