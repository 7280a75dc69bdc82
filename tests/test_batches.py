"""The stream of update batches and the randomness that belongs to it."""

from __future__ import annotations

import random
from functools import partial
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_sampa.data.batches import MicroBatch, UpdateStream, fingerprint
from hf_sampa.data.loaders import parts_of, seeded_loader
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


def test_what_a_transform_draws_belongs_to_the_row_not_to_its_batch():
    def rows(size):
        return torch.cat([batch["x"] for batch in seeded_loader(DataLoader(table(True), batch_size=size), 3)])

    assert torch.equal(rows(2), rows(5))


def test_workers_live_on_where_they_can_be_resumed():
    def lives_on(dataset, **options):
        loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True, **options)
        return seeded_loader(loader, 3).persistent_workers

    assert lives_on(tiny.NoisyImages(4))
    assert not lives_on(tiny.Stream(4)) and not lives_on(tiny.NoisyImages(4), generator=torch.Generator())


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


class Counted(tiny.NoisyImages):
    """Knows which samples were read."""

    def __init__(self, count):
        super().__init__(count)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_what_is_left_out_is_not_read():
    whole, late = Counted(24), Counted(24)
    expected = contents(read(stream(whole, accumulation=1), 7))[6]
    assert tiny.differing(contents(read(stream(late, accumulation=1, start=6), 1))[0], expected) == []
    assert late.read == whole.read[18:24]  # the batch, and the one that is visible ahead


def test_a_sampler_in_two_places_is_one_part():
    loader = DataLoader(tiny.images(4), batch_size=2)
    parts = list(parts_of(loader))
    assert [part for part in parts if part is loader.sampler] == [loader.sampler] and len(parts) == 4


def test_a_seeded_loader_has_the_options_of_the_one_that_it_stands_for():
    options = {
        "num_workers": 1,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "timeout": 7,
        "worker_init_fn": print,
    }
    loader = seeded_loader(DataLoader(tiny.images(4), batch_size=2, **options), seed=0)
    assert {name: getattr(loader, name) for name in options} == options
    generator = torch.Generator()
    loader = seeded_loader(DataLoader(tiny.images(4), batch_size=2, **options, generator=generator), seed=0)
    assert loader.generator is generator
    # which lives on with workers that do, and could not be resumed
    assert {name: getattr(loader, name) for name in options} == {**options, "persistent_workers": False}


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


def test_a_part_of_a_batch_has_its_rows_and_entries():
    inputs = {"x": torch.arange(6).view(3, 2), "texts": ["a", "b", "c"], "names": ["p", "q"], "temperature": 2.0}
    whole = MicroBatch(inputs, 4, 1, 2, share=0.5, indices=torch.tensor([7, 8, 9]), logits=torch.arange(3.0)[:, None])
    part = whole.narrowed(torch.tensor([True, False, True]))
    assert part.inputs.pop("x").tolist() == [[0, 1], [4, 5]]
    assert part.inputs == {"texts": ["a", "c"], "names": ["p", "q"], "temperature": 2.0}
    assert (part.indices.tolist(), part.logits.tolist()) == ([7, 9], [[0.0], [2.0]])
    assert (part.update, part.position, part.epoch, part.share, part.size) == (4, 1, 2, None, 2)
    # One of several pieces has a place of its own, by which its random numbers are seeded.
    assert whole.narrowed(torch.tensor([True, False, True]), 1).position == (1, 1)


def test_items_are_labels_or_samples():
    x = torch.zeros(3, 2)
    assert MicroBatch({"x": x, "labels": torch.tensor([[1, -100], [2, 3], [-100, -100]])}, 0, 0).count_items() == 3
    assert MicroBatch({"x": x}, 0, 0).count_items() == 3
    assert MicroBatch([], 0, 0).count_items() == 1


class Pair(NamedTuple):
    left: torch.Tensor
    right: list


def test_own_inputs_are_copies_of_their_kinds():
    inputs = {"pair": Pair(torch.zeros(2), [1, {"deep": torch.ones(1)}]), "rows": (torch.zeros(1),), "text": "a"}
    own = MicroBatch(inputs, 0, 0).own_inputs(torch.device("cpu"))
    assert type(own["pair"]) is Pair and type(own["rows"]) is tuple
    own["pair"].left.add_(1)
    own["pair"].right[1]["deep"].add_(1)
    own["rows"][0].add_(1)
    assert (
        tiny.differing(
            inputs,
            {"pair": Pair(torch.zeros(2), [1, {"deep": torch.ones(1)}]), "rows": (torch.zeros(1),), "text": "a"},
        )
        == []
    )


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
