"""One stream of update batches B_0, B_1, ... that both roles read, the same on every process and after every resume."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from .randomness import OwnGenerators, SeededCollate, SeededItems, derive_seed, seed_globals


# Enough to tell any two batches apart, little enough for a batch of images to cost nothing.
FINGERPRINT_ENTRIES = 4096


@dataclass
class MicroBatch:
    """What one forward and backward pass reads.

    Attributes:
        inputs: as the collator made them.
        update: t, the index of the update batch it belongs to.
        position: its place in the update batch.
        num_items: labels that count, as `Trainer` counts them; None where it cannot.
        share: weight of its mean loss in the update batch's; set before the pass.
    """

    inputs: dict[str, Any]
    update: int
    position: int
    num_items: Tensor | None = None
    share: float = 1.0


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
        _set_epoch(self.loader, epoch, derive_seed(self.seed, "generator", epoch))
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
                    "dataset is empty, or smaller than one batch with dataloader_drop_last=True."
                )
            self._begin(self._epoch + 1, 0)
            return self._read()
        micro_batches = [MicroBatch(each, self._update, position) for position, each in enumerate(inputs)]
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


class _TaggedBatches(BatchSampler):
    """Batches of ``(epoch, index)`` from batches of indices; iterated over on generators that `UpdateStream` lends."""

    def __init__(self, batch_sampler, seed: int):
        self.batch_sampler, self.seed, self.epoch = batch_sampler, seed, 0
        self.batch_size = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self):
        # Loaders draw a number before this or not, depending on their workers.
        seed_globals(derive_seed(self.seed, "sampler", self.epoch))
        for indices in self.batch_sampler:
            yield [(self.epoch, index) for index in indices]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def seeded_loader(loader: DataLoader, seed: int) -> DataLoader:
    """A plain CPU `DataLoader` like `loader` whose batches depend on (seed, epoch, indices) alone.

    Iterable datasets, and loaders without automatic batching, keep their own way of reading; their randomness follows
    the generators that `UpdateStream` lends them at the start of each epoch.
    """
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    kept += ("generator", "prefetch_factor", "persistent_workers", "in_order")
    options = {name: getattr(loader, name) for name in kept}
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **options)
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, sampler=loader.sampler, batch_size=None, **options)
    items = SeededItems(loader.dataset, seed, whole_batches=_draws_nothing(loader.dataset))
    options["collate_fn"] = SeededCollate(options["collate_fn"])
    return DataLoader(items, batch_sampler=_TaggedBatches(loader.batch_sampler, seed), **options)


def _draws_nothing(dataset) -> bool:
    """Whether this is a `datasets.Dataset` that reads columns and runs no code of the user's."""
    datasets = sys.modules.get("datasets")  # without the import there can be none of its objects
    return datasets is not None and isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"


def _set_epoch(loader: DataLoader, epoch: int, seed: int) -> None:
    """Tell the epoch to every sampler and dataset inside `loader`, and reseed generators that they keep."""
    pending, seen = [loader], set()
    while pending:
        part = pending.pop()
        seen.add(id(part))
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        if isinstance(getattr(part, "generator", None), torch.Generator):
            part.generator.manual_seed(seed)
        children = (getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset"))
        pending += [child for child in children if child is not None and id(child) not in seen]


def fingerprint(batch: Any) -> int:
    """A number in [0, 2**63) that two processes agree on when, and in practice only when, their batches are equal.

    Covers names, types, shapes and up to `FINGERPRINT_ENTRIES` evenly spread entries of each tensor.
    """
    digest = hashlib.blake2b(digest_size=8)
    _update_digest(digest, batch)
    return int.from_bytes(digest.digest(), "little") >> 1


def _update_digest(digest, value: Any) -> None:
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
        digest.update(repr(value).encode())
