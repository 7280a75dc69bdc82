"""Datasets and collators whose randomness belongs to the samples, not to what was drawn before them."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.utils.data import Dataset

from ..state import derive_seed, own_generators, seed_all, unseeded


# Under this name a batch carries the places of its samples in the dataset, where a variant needs them.
INDICES = "sampa_indices"
# And under this one what the collator makes of each half of its samples, where processes are to share batches out.
HALVES = "sampa_halves"


class _Samples(list):
    """Samples on their way to the collator, with the seed that the collator gets and their places in the dataset."""

    seed: int
    indices: list[Any]


class SeededItems(Dataset):
    """A map-style dataset whose items do not depend on what was drawn before them.

    Indexed by ``(epoch, index)``, so that the epoch reaches worker processes, persistent ones too, and there the dataset's
    ``set_epoch``. Randomness of an item derives from (seed, epoch, index).

    Args:
        dataset: map-style dataset.
        seed: of the run's data.
        whole_batches: read a batch by one call of the dataset's ``__getitems__``; randomness then derives from all its indices.
    """

    def __init__(self, dataset: Dataset, seed: int, whole_batches: bool):
        self.dataset, self.seed, self.whole_batches, self._epoch = dataset, seed, whole_batches, None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, tagged: tuple[int, Any]) -> Any:
        return self.__getitems__([tagged])[0]

    def __getitems__(self, tagged: list[tuple[int, Any]]) -> list:
        self._begin_epoch(tagged[0][0])
        own = own_generators(self.dataset)
        with unseeded():
            if self.whole_batches:
                seed_all(derive_seed(self.seed, "items", tagged), own)
                samples = _Samples(self.dataset.__getitems__([index for _, index in tagged]))
            else:
                samples = _Samples()
                for epoch, index in tagged:
                    seed_all(derive_seed(self.seed, epoch, index), own)
                    samples.append(self.dataset[index])
        samples.seed = derive_seed(self.seed, "collate", tagged)
        samples.indices = [index for _, index in tagged]
        return samples

    def _begin_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, part = epoch, self.dataset
            while part is not None:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
                part = getattr(part, "dataset", None)


class SeededCollate:
    """A collator whose randomness derives from the samples' epoch and indices.

    Args:
        collate: makes a batch of samples.
        with_indices: whether the batch, a dict then, is to carry the samples' places in the dataset as `INDICES`.
        batch_size: of all batches but the last of an epoch, where that is known.

    Attributes:
        in_halves: ``()``, in memory that workers share: whether a batch, if it is a dict, is to carry its `HALVES`.
    """

    def __init__(self, collate: Callable[[list], Any], with_indices: bool = False, batch_size: int | None = None):
        self.collate, self.with_indices, self.batch_size = collate, with_indices, batch_size or 0
        self.in_halves = torch.zeros((), dtype=torch.bool).share_memory_()

    def __call__(self, samples: _Samples) -> Any:
        batch = self._collated(samples, samples.seed)
        middle = (len(samples) + 1) // 2  # of an odd number the first half has one more
        # A rest that would leave one sample to a half, where others have several, is more than batch normalization can do with.
        too_few = len(samples) < 4 <= self.batch_size
        if self.in_halves and isinstance(batch, MutableMapping) and 1 < len(samples) and not too_few:
            halves = samples[:middle], samples[middle:]
            batch[HALVES] = [self._collated(half, derive_seed(samples.seed, j)) for j, half in enumerate(halves)]
        if self.with_indices:
            batch[INDICES] = torch.tensor(samples.indices)
        return batch

    def _collated(self, samples: list, seed: int) -> Any:
        with unseeded():
            seed_all(seed, own_generators(self.collate))
            return self.collate(list(samples))
