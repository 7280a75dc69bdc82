"""Batches of any kind, and loaders of one's own: used as they are, one stream for both roles, exact after a resume."""

from __future__ import annotations

import random

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler
from transformers import BertForMaskedLM, BertTokenizerFast, DataCollatorForLanguageModeling, Trainer

from hf_sampa import SAMPaTrainer
from hf_sampa.data.batches import count_samples
from tests import tiny
from tests.ranks import run_ranks


class Net(nn.Module):
    """Learns from a batch of any kind, by the tensors that are found in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return {"loss": (self.layer(x) - 1).square().mean()}


def samples(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, generator=generator) for _ in range(count)]


class Graph:
    """A batch that is an object, as graph libraries make them."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return 1

    def __contains__(self, name):
        return name == "x"

    def to(self, device, **kwargs):
        return Graph(self.x.to(device))


# How a collator makes a batch of samples, and how a loss finds x in it.
KINDS = {
    "dict": (lambda items: {"x": torch.stack(items)}, lambda batch: batch["x"]),
    "list": (lambda items: [torch.stack(items), torch.ones(len(items))], lambda batch: batch[0]),
    "tuple": (lambda items: (torch.stack(items), ["text"] * len(items)), lambda batch: batch[0]),
    "nested": (lambda items: {"name": "set", "of": {"x": torch.stack(items)}}, lambda batch: batch["of"]["x"]),
    "samples": (lambda items: [{"x": item, "id": "a"} for item in items], lambda b: torch.stack([e["x"] for e in b])),
    "object": (lambda items: Graph(torch.stack(items)), lambda batch: batch.x),
    "texts": (lambda items: {"text": ["a"] * len(items), "x": torch.stack(items)}, lambda batch: batch["x"]),
}


def of_kind(kind):
    class OfKind(SAMPaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(KINDS[kind][1](inputs))["loss"]

    return OfKind


def train_kind(folder, kind, resume=None, **changes):
    settings = {"max_steps": 6, "remove_unused_columns": False, "gradient_accumulation_steps": 2, **changes}
    return tiny.run(folder, Net(), samples(22), of_kind(kind), resume, {"data_collator": KINDS[kind][0]}, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_are_the_same_training(tmp_path, kind):
    """Ragged micro-batches included, which are weighed by their number of samples."""
    assert tiny.differing(train_kind(tmp_path, kind), train_kind(tmp_path, "dict")) == []


def all_kinds(folder):
    return {kind: train_kind(folder / kind, kind) for kind in KINDS}


@pytest.mark.distributed
def test_batches_of_any_kind_on_two_processes(tmp_path):
    expected = all_kinds(tmp_path / "one")
    for outcome in run_ranks(all_kinds, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(outcome, expected) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_samples_are_counted(kind, count):
    assert count_samples(KINDS[kind][0](samples(count))) == count


# ---- Loaders ----


class Backwards(DataLoader):
    """Gives its batches from last to first."""

    def __iter__(self):
        yield from list(super().__iter__())[::-1]


class Several:
    """One loader after the other; no DataLoader."""

    def __init__(self, *loaders):
        self.loaders = loaders

    def __len__(self):
        return sum(map(len, self.loaders))

    def __iter__(self):
        for loader in self.loaders:
            yield from loader


class OwnSampler(Sampler):
    """Draws an order of its own in every epoch."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        yield from torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch + 7)).tolist()


class OwnBatches(Sampler):
    """Batches of two sizes."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return len(list(iter(self)))

    def __iter__(self):
        order, sizes = torch.randperm(self.count).tolist(), [2, 5]
        while order:
            size = sizes[len(order) % 2]
            yield order[:size]
            order = order[size:]


class Drawing(Sampler):
    """Draws every order from a generator that it keeps, one of the three kinds."""

    def __init__(self, count, generator):
        self.count, self.generator = count, generator

    def __len__(self):
        return self.count

    def __iter__(self):
        if isinstance(self.generator, np.random.Generator):
            yield from self.generator.permutation(self.count).tolist()
        else:
            yield from self.generator.sample(range(self.count), self.count)


def collate(items):
    return {"x": torch.stack(items)}


LOADERS = {
    "own iteration": lambda data: Backwards(data, batch_size=4, shuffle=True, collate_fn=collate),
    "several": lambda data: Several(
        DataLoader(data[:9], 4, shuffle=True, collate_fn=collate), DataLoader(data[9:], 2, collate_fn=collate)
    ),
    "own sampler": lambda data: DataLoader(data, 4, sampler=OwnSampler(len(data)), collate_fn=collate),
    "own batches": lambda data: DataLoader(data, batch_sampler=OwnBatches(len(data)), collate_fn=collate),
    "workers": lambda data: DataLoader(
        data, 4, shuffle=True, collate_fn=collate, num_workers=2, persistent_workers=True
    ),
    "numpy sampler": lambda data: DataLoader(
        data, 4, sampler=Drawing(len(data), np.random.default_rng(3)), collate_fn=collate
    ),
    "python samplers": lambda data: Several(
        *[DataLoader(data, 4, sampler=Drawing(len(data), random.Random(i)), collate_fn=collate) for i in range(2)]
    ),
    "generator function": lambda data: Several([collate(data[i : i + 4]) for i in range(0, len(data), 4)]),
}


def with_loader(name):
    class WithLoader(SAMPaTrainer):
        def get_train_dataloader(self):
            return LOADERS[name](self.train_dataset)

    return WithLoader


def train_loader(folder, name, resume=None, **changes):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 9, **changes}
    return tiny.run(folder, Net(), samples(21), with_loader(name), resume, **settings)


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_of_ones_own_is_resumed_exactly(tmp_path, name):
    whole = train_loader(tmp_path, name)
    resumed = train_loader(tmp_path / "again", name, str(tmp_path / "checkpoint-9"))
    assert tiny.differing(tiny.comparable(resumed), tiny.comparable(whole)) == []


def all_loaders(folder):
    return {name: train_loader(folder / name, name) for name in LOADERS}


@pytest.mark.distributed
def test_loaders_of_ones_own_on_two_processes(tmp_path):
    expected = all_loaders(tmp_path / "one")
    for outcome in run_ranks(all_loaders, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(outcome, expected) == []


def test_a_way_of_iterating_is_not_lost(tmp_path):
    """The first batch of `Backwards` is the last of the loader that it is made of."""
    seen = tiny.Passes()

    class Seeing(with_loader("own iteration")):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen(len(inputs["x"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    tiny.run(tmp_path, Net(), samples(21), Seeing, max_steps=2)
    assert seen.seen[0] == 1  # of 21 samples by four


class Once:
    """Can be read once, and not from where a run was stopped."""

    def __init__(self, data):
        self.iterator = iter([collate(data[i : i + 4]) for i in range(0, len(data), 4)])

    def __iter__(self):
        return self.iterator


def test_a_loader_that_cannot_be_replayed_is_said_on_resume(tmp_path):
    shared = Once(samples(60))

    class Shared(SAMPaTrainer):
        def get_train_dataloader(self):
            return shared

    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    tiny.run(tmp_path, Net(), samples(8), Shared, **settings)
    with pytest.raises(
        ValueError, match="Expected the next update batch to be the one that the checkpoint's run would"
    ):
        tiny.run(tmp_path, Net(), samples(8), Shared, str(tmp_path / "checkpoint-3"), **settings)


class Epochs(Dataset):
    """Items that depend on the epoch it was told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return samples(16)[index] + self.epoch


@pytest.mark.parametrize("resume", [3, 6])
def test_workers_that_live_on_know_the_epoch(tmp_path, resume):
    """No workers, workers, persistent workers, and a run that is resumed in another epoch: one training."""

    def train(folder, checkpoint=None, **workers):
        settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3, **workers}
        return tiny.run(
            folder, Net(), Epochs(), resume=checkpoint, trainer_kwargs={"data_collator": collate}, **settings
        )

    expected = tiny.comparable(train(tmp_path / "none"))
    for name, persistent in (("two", False), ("persistent", True)):
        workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
        assert tiny.differing(tiny.comparable(train(tmp_path / name, **workers)), expected) == []
    checkpoint = str(tmp_path / "persistent" / f"checkpoint-{resume}")
    assert tiny.differing(tiny.comparable(train(tmp_path / "again", checkpoint, **workers)), expected) == []


def test_a_shuffled_stream_of_datasets_has_the_order_of_plain_trainer(tmp_path):
    """In every epoch, and after a resume in one of them: its order belongs to the epoch that it is told."""
    rows = datasets.Dataset.from_dict({"x": [each.tolist() for each in samples(21)]})
    stream = rows.to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=5).with_format("torch")

    def train(folder, trainer_class=SAMPaTrainer, resume=None):
        settings = {"max_steps": 15, "save_strategy": "steps", "save_steps": 8, "rho": 0.0, "lmbda": 0.0}
        return tiny.run(folder, Net(), stream, trainer_class, resume, **settings)["weights"]

    expected = train(tmp_path / "plain", Trainer)
    assert tiny.differing(train(tmp_path / "ours"), expected) == []
    resumed = train(tmp_path / "again", resume=str(tmp_path / "ours" / "checkpoint-8"))
    assert tiny.differing(resumed, expected) == []


class Batched(Dataset):
    """Read by batches only."""

    def __len__(self):
        return 18

    def __getitems__(self, indices):
        return [samples(18)[i] + 0.1 * torch.randn(4) for i in indices]


def test_a_dataset_that_is_read_by_batches(tmp_path):
    args = {"trainer_kwargs": {"data_collator": collate}, "save_strategy": "steps", "save_steps": 3}
    whole = tiny.run(tmp_path, Net(), Batched(), **args)
    again = tiny.run(tmp_path / "again", Net(), Batched(), resume=str(tmp_path / "checkpoint-3"), **args)
    assert tiny.differing(tiny.comparable(again), tiny.comparable(whole)) == []


# ---- The end of the data ----


class Finite(IterableDataset):
    """A stream that is over for good once it was read."""

    def __init__(self, count):
        self.iterator = iter(samples(count))

    def __iter__(self):
        return self.iterator


def stream(folder, count, method="sampa", **changes):
    kwargs = {"data_collator": collate}
    return tiny.run(folder, Net(), Finite(count), trainer_kwargs=kwargs, max_steps=5, method=method, **changes)


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_a_stream_that_holds_exactly_max_steps_batches_is_trained_to_its_end(tmp_path, caplog, method):
    with tiny.transformers_log(caplog):
        outcome = stream(tmp_path, 20, method, lmbda=0.5)
    assert outcome["steps"] == 5
    assert ("no batch after this step's" in caplog.text) == (method == "sampa")


def test_the_last_step_of_all_is_sam_without_look_ahead(tmp_path):
    """G_t = g~_t, as with lambda = 0: the other steps are what they are with one batch more."""
    short, long = tiny.Recorder(), tiny.Recorder()
    for recorder, count in ((short, 20), (long, 24)):
        kwargs = {"data_collator": collate, "callbacks": [recorder]}
        tiny.run(tmp_path, Net(), Finite(count), trainer_kwargs=kwargs, max_steps=5, lmbda=0.5)
    zero = tiny.Recorder()
    kwargs = {"data_collator": collate, "callbacks": [zero, ZeroLast()]}
    tiny.run(tmp_path, Net(), Finite(24), trainer_kwargs=kwargs, max_steps=5, lmbda=0.5)
    assert tiny.differing(short.weights[:4], long.weights[:4]) == []
    assert tiny.differing(short.weights[4], long.weights[4]) != []
    assert tiny.differing(short.weights, zero.weights) == []


class ZeroLast(tiny.TrainerCallback):
    """Sets lambda to 0 before the last step."""

    def on_step_begin(self, args, state, control, **kwargs):
        args.lmbda = 0.0 if state.global_step == 4 else args.lmbda


def ended_streams(folder):
    variants = [{}, {"shard_optimizer": True}, {"variant": "gsam"}, {"lmbda": 0.0}]
    return [stream(folder / str(i), 20, **changes) for i, changes in enumerate(variants)]


@pytest.mark.distributed
def test_streams_that_end_on_two_processes(tmp_path):
    expected = ended_streams(tmp_path / "one")
    for outcome in run_ranks(ended_streams, 2, tmp_path / "two", folder=tmp_path):
        for each in (outcome[1], expected[1]):
            each.pop("optimizer", None)  # of which each of two processes holds a half
            each["logs"] = tiny.without_cosine(each["logs"])
        assert tiny.differing(outcome, expected) == []


def test_a_stream_that_is_over_before_max_steps_ends_the_run(tmp_path):
    assert stream(tmp_path, 12)["steps"] == 3


class EndEpoch(tiny.TrainerCallback):
    """Ends an epoch once, between two micro-batches of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_epoch_stop, self.step = True, None


@pytest.mark.parametrize("step", [1, 2], ids=["in the midst", "at the last batch"])
def test_an_epoch_that_is_ended_between_micro_batches(tmp_path, step):
    """The batch that had begun is not trained on; the next epoch begins with its own first batch, and is resumed exactly."""

    def train(folder, checkpoint=None, end=step):
        settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
        kwargs = {"data_collator": collate, "callbacks": [EndEpoch(end)]}
        return tiny.run(folder, Net(), samples(24), resume=checkpoint, trainer_kwargs=kwargs, **settings)

    whole = train(tmp_path)
    assert whole["steps"] == step + 3 + 3  # of three steps, the first epoch has as many as were through
    for at, end in ((step, step), (step + 1, None)):
        resumed = train(tmp_path / f"again{at}", str(tmp_path / f"checkpoint-{at}"), end)
        assert tiny.differing(tiny.comparable(resumed), tiny.comparable(whole)) == []


# ---- Samplers and generators ----


def test_a_sampler_for_another_world_is_refused(tmp_path):
    class Sharing(SAMPaTrainer):
        def get_train_dataloader(self):
            sampler = DistributedSampler(self.train_dataset, num_replicas=2, rank=0)
            return DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=collate)

    with pytest.raises(
        ValueError, match=r"among 1 replica\(s\), but got a DistributedSampler for 2.*num_replicas=args"
    ):
        tiny.run(tmp_path, Net(), samples(16), Sharing)


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(55))]
    return BertTokenizerFast({word: place for place, word in enumerate(words)})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collator_with_a_generator_of_its_own(tmp_path, tokenizer, workers):
    """transformers' masking with a seed, which keeps a generator from the first batch on."""

    def train(folder, checkpoint=None):
        data = [{"input_ids": [5 + (i + j) % 50 for j in range(12)]} for i in range(24)]
        kwargs = {"data_collator": DataCollatorForLanguageModeling(tokenizer, seed=7)}
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers}
        return tiny.run(
            folder, tiny.bert(head=BertForMaskedLM), data, resume=checkpoint, trainer_kwargs=kwargs, **settings
        )

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"))
    assert tiny.differing(tiny.comparable(resumed), tiny.comparable(whole)) == []


class OwnNoise(Dataset):
    """Noise from a generator that the dataset keeps."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return 18

    def __getitem__(self, index):
        return samples(18)[index] + 0.1 * torch.randn(4, generator=self.generator)


def test_a_dataset_with_a_generator_of_its_own(tmp_path):
    args = {"trainer_kwargs": {"data_collator": collate}, "save_strategy": "steps", "save_steps": 3}
    whole = tiny.run(tmp_path, Net(), OwnNoise(), **args)
    again = tiny.run(tmp_path / "again", Net(), OwnNoise(), resume=str(tmp_path / "checkpoint-3"), **args)
    assert tiny.differing(tiny.comparable(again), tiny.comparable(whole)) == []


# ---- Settings that a callback changes ----


class Change(tiny.TrainerCallback):
    def __init__(self, **changes):
        self.changes = changes

    def on_epoch_end(self, args, state, control, **kwargs):
        for name, value in self.changes.items():
            setattr(args, name, value)


def test_rho_and_lambda_are_followed(tmp_path):
    def train(**changes):
        kwargs = {"callbacks": [Change(**changes)], "data_collator": collate}
        return tiny.run(tmp_path, Net(), samples(16), trainer_kwargs=kwargs, num_train_epochs=2)["weights"]

    weights = [train(), train(rho=0.5), train(lmbda=0.9)]
    for i, one in enumerate(weights):
        assert all(tiny.differing(one, other) != [] for other in weights[i + 1 :])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: expected 1 throughout, but a callback set it to 2",
        ),
        ({"variant": "gsam"}, "variant: expected 'sam' throughout, but a callback set it to 'gsam'"),
        ({"rho": -1.0}, "rho: expected a finite number of at least 0, got -1.0"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_once(tmp_path, changes, message):
    steps = tiny.Recorder()
    kwargs = {"callbacks": [Change(**changes), steps], "data_collator": collate}
    with pytest.raises(ValueError, match=message):
        tiny.run(tmp_path, Net(), samples(16), trainer_kwargs=kwargs, num_train_epochs=2)
    assert len(steps.weights) == 4  # the first epoch's
