"""Training loaders, those that are plain rebuilt: sharded by replica instead of by rank, with randomness that belongs to the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from ..distributed import Mesh
from ..state import derive_seed, seed_globals
from .seeded_data import SeededCollate, SeededItems


# Not in_order: batches must not depend on which worker is faster.
KEPT = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
KEPT += ("generator", "prefetch_factor", "persistent_workers")


def prepare_and_remember(prepare: Callable[..., Iterable], loader: Iterable, *args: Any, **kwargs: Any) -> Iterable:
    """What accelerate's `prepare` makes of `loader`, with the loader itself, as `unprepared`: it is not one process's part of the data."""
    prepared = prepare(loader, *args, **kwargs)
    prepared.unprepared = getattr(loader, "unprepared", loader)
    return prepared


def replica_loader(loader: Iterable, mesh: Mesh, split_batches: bool, data_seed: int | None) -> Iterable:
    """`loader` as one replica reads it; one that accelerate has not prepared is returned as it is.

    Whatever the accelerator's configuration says, all replicas get equally many batches, in an order drawn from the
    seed: anything else ends in processes that wait for each other.
    """
    if not hasattr(loader, "unprepared"):
        return loader
    loader = loader.unprepared
    if isinstance(loader.dataset, IterableDataset) and mesh.num_replicas > 1:
        # `prepare_data_loader` would give each replica whole files of a sharded dataset, and epochs of its own length.
        dataset = IterableDatasetShard(
            loader.dataset,
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            num_processes=mesh.num_replicas,
            process_index=mesh.replica,
            split_batches=split_batches,
        )
        batch_size = loader.batch_size // mesh.num_replicas if split_batches else loader.batch_size
        return DataLoader(dataset, batch_size=batch_size, drop_last=loader.drop_last, **_options(loader))
    return prepare_data_loader(
        loader,
        num_processes=mesh.num_replicas,
        process_index=mesh.replica,
        split_batches=split_batches,
        put_on_device=False,
        dispatch_batches=False,
        even_batches=True,
        use_seedable_sampler=True,
        data_seed=data_seed,
    )


def seeded_loader(loader: Iterable, seed: int, with_indices: bool = False) -> Iterable:
    """A plain CPU `DataLoader` like `loader` whose batches depend on (seed, epoch, indices) alone.

    Iterable datasets, and loaders without automatic batching, keep their own way of reading; their randomness follows
    the generators that `UpdateStream` lends them at the start of each epoch. So does that of loaders of one's own, which are
    returned as they are: subclasses of DataLoader, and objects that are none.

    Raises ValueError where batches are to carry their samples' places in the dataset (`with_indices`) and there are none.
    """
    plain = is_plain(loader)
    sampled = plain and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
    if with_indices and not sampled:
        raise ValueError(
            "variant: expected a dataset with a length and a place for every sample, because the variant remembers single "
            "samples, but got an iterable dataset, one that makes its own batches, or a loader of one's own. Take another "
            "variant."
        )
    if not plain:
        return loader
    options = _options(loader)
    if isinstance(loader.dataset, IterableDataset) or loader.generator is not None:
        # Workers, or a generator, that live on from epoch to epoch could not be resumed.
        options["persistent_workers"] = False
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **options)
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, sampler=loader.sampler, batch_size=None, **options)
    items = SeededItems(loader.dataset, seed, whole_batches=_reads_batches(loader.dataset))
    batches = _TaggedBatches(loader.batch_sampler, seed)
    options["collate_fn"] = SeededCollate(options["collate_fn"], with_indices, batches.batch_size)
    return DataLoader(items, batch_sampler=batches, **options)


def is_plain(loader: Any) -> bool:
    """Whether this is torch's DataLoader itself, or what accelerate made of one: nobody's own way of iterating is lost in a copy."""
    return type(loader) is DataLoader or (
        isinstance(loader, DataLoader) and type(loader).__module__ == "accelerate.data_loader"
    )


def is_seeded(loader: Any) -> bool:
    """Whether `seeded_loader` made it, so that batches can be left out without reading them."""
    return isinstance(getattr(loader, "batch_sampler", None), _TaggedBatches)


def set_halves(loader: Any, wanted: bool) -> None:
    """Let batches of a loader that `seeded_loader` made carry what is made of each half of their samples, or no longer."""
    if is_seeded(loader):
        loader.collate_fn.in_halves.fill_(wanted)


def check_samplers(loader: Any, mesh: Mesh) -> None:
    """Raise ValueError where a sampler shares the data out among other processes than the replicas of a role."""
    for part in parts_of(loader):
        if isinstance(part, DistributedSampler) and part.num_replicas != mesh.num_replicas:
            raise ValueError(
                f"Expected a sampler that shares the data among {mesh.num_replicas} replica(s), but got a DistributedSampler for "
                f"{part.num_replicas}: both processes of a pair have to read the same batches. Build it in get_train_dataloader, "
                "where args.world_size and args.process_index are those of the role, or with num_replicas=args.num_replicas "
                "and rank=args.mesh.replica."
            )


def parts_of(loader: Any) -> Iterator[Any]:
    """`loader` and every sampler and dataset inside it, once each."""
    pending, seen = [loader], set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        children = (getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset"))
        pending += [child for child in children if child is not None]


def _options(loader: DataLoader) -> dict[str, Any]:
    return {name: getattr(loader, name) for name in KEPT}


def _reads_batches(dataset) -> bool:
    """Whether a batch is read by one call: by a method of the author's own, or a `datasets.Dataset` that runs no code of his."""
    datasets = sys.modules.get("datasets")  # without the import there can be none of its objects
    if datasets is not None and isinstance(dataset, datasets.Dataset):
        return dataset.format["type"] != "custom"
    return hasattr(dataset, "__getitems__") and not type(dataset).__getitems__.__module__.startswith("torch.")


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
