"""The stream of update batches and the randomness that belongs to it."""

from __future__ import annotations

import random
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_sampa.data.batches import UpdateStream, fingerprint
from hf_sampa.data.loaders import seeded_loader
from hf_sampa.state.randomness import GlobalState, OwnGenerators, derive_seed, seeded
from tests import tiny


def collate_noisily(items):
    """Collator that draws from all three global generators."""
    batch = torch.utils.data.default_collate(items)
    return {**batch, "drawn": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])}


def transform(rows):
    return {"x": [torch.tensor(x) + torch.rand(2) for x in rows["x"]]}


def table(with_transform: bool):
    data = datasets.Dataset.from_dict({"x": [[float(i), 0.0] for i in range(10)]})
    return data.with_transform(transform) if with_transform else data.with_format("torch")


DATASETS = {
    "map-style with augmentation": lambda: tiny.NoisyImages(10),
    "iterable": lambda: tiny.Stream(10),
    "table": partial(table, False),
    "table with transform": partial(table, True),
}


def stream(dataset, workers=0, accumulation=2, epoch=0, start=0, seed=3, update=0, persistent=False):
    shuffled = {} if isinstance(dataset, torch.utils.data.IterableDataset) else {"shuffle": True}
    options = {"num_workers": workers, "persistent_workers": persistent, "collate_fn": collate_noisily}
    loader = seeded_loader(DataLoader(dataset, batch_size=3, **shuffled, **options), seed)
    return UpdateStream(loader, seed=seed, accumulation=accumulation, epoch=epoch, start=start, update=update)


def read(a_stream, count):
    return [a_stream.advance() for _ in range(count)]


def contents(batches):
    return [[micro_batch.inputs for micro_batch in batch] for batch in batches]


@pytest.mark.parametrize("name", DATASETS)
def test_batches_depend_on_nothing_but_seed_epoch_and_index(name):
    """Not on workers, nor on what others draw from the global generators, nor on where reading began."""
    expected = read(stream(DATASETS[name]()), 6)
    assert [(batch.epoch, batch.start, len(batch.micro_batches)) for batch in expected[:4]] == [
        (0, 0, 2),
        (0, 2, 2),
        (1, 0, 2),
        (1, 2, 2),
    ]
    torch.manual_seed(99)
    np.random.seed(99)
    found = []
    again = stream(DATASETS[name]())
    for _ in range(6):
        torch.rand(7), np.random.rand(7), random.random()
        found.append(again.advance())
    assert tiny.differing(contents(found), contents(expected)) == []
    begun_later = read(stream(DATASETS[name](), epoch=1, start=2, update=3), 3)
    assert tiny.differing(contents(begun_later), contents(expected[3:])) == []
    assert [micro_batch.update for batch in begun_later for micro_batch in batch] == [3, 3, 4, 4, 5, 5]
    assert tiny.differing(contents(read(stream(DATASETS[name](), seed=4), 1)), contents(expected[:1])) != []


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", ["map-style with augmentation", "table with transform"])
def test_workers_change_nothing(name, persistent):
    expected = read(stream(DATASETS[name]()), 6)
    found = read(stream(DATASETS[name](), workers=2, persistent=persistent), 6)
    assert tiny.differing(contents(found), contents(expected)) == []


def test_epochs_differ_and_every_sample_comes_once():
    epochs = [[], []]
    for batch in read(stream(table(False)), 4):
        epochs[batch.epoch] += [x for micro_batch in batch for x in micro_batch.inputs["x"][:, 0].tolist()]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [float(i) for i in range(10)]


def test_the_next_batch_is_visible_ahead():
    a_stream = stream(table(False))
    ahead = a_stream.peek()
    assert a_stream.advance() is ahead
    assert a_stream.peek() is not ahead


def test_leaving_an_epoch():
    a_stream, expected = stream(table(False)), read(stream(table(False)), 3)[2]
    a_stream.advance()
    a_stream.leave_epoch(update=1)
    assert tiny.differing(contents([a_stream.peek()]), contents([expected])) == []
    assert a_stream.peek().micro_batches[0].update == 1


class ByName(Dataset):
    """Map-style dataset that is indexed by names."""

    def __len__(self):
        return 2

    def __getitem__(self, name):
        return {"x": torch.rand(1), "name": len(name)}


def test_loaders_with_a_batch_sampler_or_without_batching():
    named = seeded_loader(DataLoader(ByName(), batch_sampler=[["a", "bb"]]), 0)
    assert next(iter(named))["name"].tolist() == [1, 2]
    unbatched = UpdateStream(
        seeded_loader(DataLoader(tiny.images(4), batch_size=None), 0),
        seed=0,
        accumulation=1,
        epoch=0,
        start=2,
        update=2,
    )
    assert torch.equal(unbatched.peek().micro_batches[0].inputs["pixel_values"], tiny.images(4)[2]["pixel_values"])


def test_fingerprints_tell_batches_apart():
    batch = {"a": torch.arange(20000.0), "b": ["x", 1], "c": torch.tensor(3)}
    assert fingerprint(batch) == fingerprint({"c": torch.tensor(3), "b": ["x", 1], "a": torch.arange(20000.0)})
    others = [
        {**batch, "a": torch.arange(20000.0).flip(0)},
        {**batch, "a": torch.arange(20000.0).double()},
        {**batch, "a": torch.arange(20000.0).view(2, -1)},
        {**batch, "b": ["x", 2]},
        {**batch, "c": torch.tensor(4)},
        {"a": batch["a"], "b": batch["b"]},
    ]
    prints = {fingerprint(other) for other in [batch, *others]}
    assert len(prints) == 7
    assert all(0 <= value < 2**63 for value in prints)
    assert fingerprint([torch.ones(3, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(True)]) >= 0


def test_seeds_derive_from_their_parts_alone():
    assert derive_seed(1, "a") == 4207620368297011618  # on every machine and for ever: checkpoints rely on it
    assert len({derive_seed(1, 2), derive_seed(12), derive_seed(2, 1), derive_seed(1, "2")}) == 4


def test_generators_are_given_back_even_after_an_exception():
    before = GlobalState()
    with pytest.raises(KeyError), seeded(5):
        drawn = torch.rand(3), np.random.rand(3), random.random()
        raise KeyError
    after = GlobalState()
    assert torch.equal(before.torch, after.torch) and before.python == after.python
    with seeded(5):
        assert torch.equal(torch.rand(3), drawn[0])
        assert (np.random.rand(3) == drawn[1]).all()
        assert random.random() == drawn[2]


def test_own_generators_go_on_where_they_were():
    with seeded(8):
        expected = torch.rand(4)
    own = OwnGenerators(8)
    parts = []
    for _ in range(2):
        torch.rand(5)
        with own.lent():
            parts.append(torch.rand(2))
    assert torch.equal(torch.cat(parts), expected)
