"""The evaluation loss on several processes is that of one: the mean over the samples, each counted once."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from datasets import IterableDataset
from torch import nn
from torch.utils.data import DataLoader

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.finetuning import BaselineTrainer, FineTuningArguments
from tests import tiny
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

BATCH = 4
# A whole last batch; one that leaves a rank of two or four with a part, with one sample, with nothing.
SIZES = (16, 13, 11, 9, 6, 3, 1)


class Counting(SAMPaTrainer):
    """Keeps figures of its own while a loss is computed, as TRL's trainers do."""

    losses = 0

    def compute_loss(self, *args, **kwargs):
        self.losses += 1
        return super().compute_loss(*args, **kwargs)


class Scalars(nn.Module):
    """Its targets have a name of their own, and one of its outputs is not one per sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, target=None):
        return {"loss": ((self.weight * x - target) ** 2).mean(), "norms": self.weight.detach()[None], "logits": x}


class Asking(Scalars):
    """A loss that needs the other processes."""

    def forward(self, x, target=None):
        dist.barrier()
        return super().forward(x, target)


def numbers(count):
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(2, count, generator=generator)
    return [{"x": a, "target": b} for a, b in zip(x, target, strict=True)]


def settings(folder, kind, **given):
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_eval_batch_size=BATCH,
        **given,
    )


def trainers(folder):
    """Every kind of trainer and model by a name, with data of so many samples."""
    yield "classes", SAMPaTrainer(tiny.bert(), settings(folder, SAMPaTrainingArguments)), tiny.sentences
    given = settings(folder, FineTuningArguments, method="adamw", eval_strategy="no", label_smoothing_factor=0.1)
    yield "baseline", BaselineTrainer(tiny.bert(), given), tiny.sentences
    yield "tokens", SAMPaTrainer(tiny.token_bert(), settings(folder, SAMPaTrainingArguments)), tiny.tagged_sentences
    given = settings(folder, SAMPaTrainingArguments, label_names=["target"])
    yield "other names", SAMPaTrainer(Scalars(), given), numbers


def evaluated(folder):
    """The losses of every trainer on every size, on one process or more."""
    found = {}
    for name, trainer, data in trainers(folder):
        for size in SIZES:
            metrics = trainer.evaluate(data(size))
            found[f"{name}, {size} samples"] = metrics["eval_loss"]
    trainer = Counting(tiny.bert(), settings(folder, SAMPaTrainingArguments))
    trainer.evaluate(tiny.sentences(11))
    assert trainer.losses == -(-11 // BATCH // trainer.args.world_size)
    both = trainer.evaluate({"a": tiny.sentences(9), "b": tiny.sentences(7, seed=2)})
    found |= {name: both[name] for name in ("eval_a_loss", "eval_b_loss")}
    predicted = trainer.predict(tiny.sentences(9))
    found |= {"predicted": predicted.metrics["test_loss"], "logits": predicted.predictions.sum()}
    assert "eval_loss" not in trainer.evaluate([{"input_ids": each["input_ids"]} for each in tiny.sentences(9)])
    return found


def rows(count):
    yield from ({"x": each["x"].item(), "target": each["target"].item()} for each in numbers(count))


def evaluated_in_a_stream(folder):
    """Data without a length, which the main process reads for all."""
    given = settings(folder, SAMPaTrainingArguments, label_names=["target"])
    trainer = SAMPaTrainer(Scalars(), given)
    return {
        size: trainer.evaluate(IterableDataset.from_generator(rows, gen_kwargs={"count": size}))["eval_loss"]
        for size in SIZES
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_loss_is_the_mean_over_the_samples(world_size, tmp_path):
    expected = run_ranks(evaluated, 1, tmp_path / "model", folder=tmp_path / "one")[0]
    for found in run_ranks(evaluated, world_size, tmp_path / "model", folder=tmp_path / "many"):
        assert found == pytest.approx(expected, rel=1e-5)


def test_so_it_is_of_a_stream(tmp_path):
    expected = {size: mean_loss(numbers(size)) for size in SIZES}
    for found in run_ranks(evaluated_in_a_stream, 2, tmp_path / "model", folder=tmp_path / "two"):
        assert found == pytest.approx(expected, rel=1e-5)


def mean_loss(data):
    return torch.stack([(0.3 * each["x"] - each["target"]) ** 2 for each in data]).mean().item()


def evaluated_inexactly(folder):
    """What cannot be made exact, and the warnings that say so."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_sampa.evaluation").addHandler(handler)
    given = settings(folder, SAMPaTrainingArguments, label_names=["target"])
    trainer = SAMPaTrainer(Asking(), given)
    trainer.evaluate(numbers(8))
    assert not said
    loss = trainer.evaluate(numbers(7))["eval_loss"]
    return loss, said


def test_what_is_not_exact_is_said(tmp_path):
    (loss, said), (other, silent) = run_ranks(evaluated_inexactly, 2, tmp_path / "model", folder=tmp_path / "two")
    # The last sample's place is filled with the first.
    data = numbers(7)
    first, last = mean_loss(data[:4]), mean_loss([*data[4:], data[0]])
    assert loss == other == pytest.approx((4 * first + 3 * last) / 7, rel=1e-5)
    assert len(said) == 1 and silent == []
    assert said[0].removeprefix("[RANK 0] ") == (
        "eval_loss counts some samples twice: the data do not divide evenly among the processes, and of a batch whose values are "
        "not one per sample, or of a loss that asks other processes, the part is not known that belongs to those which fill it up. "
        "Evaluate on one process for the exact mean."
    )


class OwnLoader(SAMPaTrainer):
    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(eval_dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)


def said_in(folder, trainer_class, count, **changes):
    """The warnings of an evaluation."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage().removeprefix("[RANK 0] "))
    logging.getLogger("hf_sampa.evaluation").addHandler(handler)
    given = settings(folder, SAMPaTrainingArguments, label_names=["target"], **changes)
    trainer_class(Scalars(), given).evaluate(numbers(count))
    return said


@pytest.mark.parametrize(
    ("trainer_class", "count", "warned"), [(SAMPaTrainer, 7, 0), (OwnLoader, 8, 0), (OwnLoader, 7, 1)]
)
def test_a_loader_of_ones_own_with_a_short_batch_is_said(trainer_class, count, warned, tmp_path):
    """Its samples weigh more than others."""
    (said,) = run_ranks(said_in, 1, tmp_path / "model", trainer_class, count, folder=tmp_path / "one")
    assert len(said) == warned
    for line in said:
        assert line == (
            "eval_loss may weigh a short batch as a whole one: its loader is not accelerate's, or has no length, so that nobody knows "
            "how many samples the last batch has. Return self.accelerator.prepare(loader), or give data of a known length."
        )


def split(folder):
    return said_in(folder, SAMPaTrainer, 7, accelerator_config={"split_batches": True})


def test_batches_that_are_split_are_said(tmp_path):
    said, _ = run_ranks(split, 2, tmp_path / "model", folder=tmp_path / "two")
    assert said == [
        "eval_loss weighs the last batch less than the others: with split_batches=True a process has a part of a batch, and its loss "
        "counts as that of a whole one. Leave split_batches out, or evaluate on one process for the exact mean."
    ]
