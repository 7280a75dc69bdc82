"""`sampa_start`: against the serial reference, what it refuses, and what the log and the card say of it."""

from __future__ import annotations

import io
import json
import sys
from functools import partial

import late_start
import late_start_worker
import pytest
import torch
from torch.utils.data import default_collate
from transformers import Trainer

from hf_sampa import SAMPaTrainer
from hf_sampa.data import MicroBatch, UpdateBatch
from hf_sampa.distributed import Exchange, Mesh
from hf_sampa.engine import SampleView
from tests import reference, tiny


def batches_in_order(dataset, size, count):
    epoch = [dataset[i : i + size] for i in range(0, len(dataset), size)]
    return [default_collate(epoch[t % len(epoch)]) for t in range(count)]


@pytest.mark.parametrize("method", ["sampa", "sam"])
@pytest.mark.parametrize(("start", "first"), [(3, 3), (0.4, 3), (0.99, 7), (0.0, 0)])
def test_the_base_optimizer_and_then_the_serial_reference(tmp_path, method, start, first):
    """To rounding, as SAMPa's halves of a batch are added up; sharpness-aware steps go on with the optimizer's state that is there."""
    dataset, steps = tiny.sentences(18), 8
    settings = {"max_steps": steps, "max_grad_norm": 0.1, "train_sampling_strategy": "sequential", "method": method}
    args = tiny.arguments(tmp_path, sampa_start=start, **settings)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=dataset)
    trainer.train()

    expected = tiny.bert()
    plain = Trainer(model=expected, args=args, train_dataset=dataset)
    plain.create_optimizer_and_scheduler(steps)
    loss, batches = lambda model, batch: model(**batch).loss, batches_in_order(dataset, 4, steps + 1)
    for batch in batches[:first]:
        reference.update(expected, plain.optimizer, reference.grad(expected, loss, batch), 0.1)
        plain.lr_scheduler.step()
    later = {"sampa": partial(reference.sampa, lmbda=args.lmbda), "sam": reference.sam}[method]
    last = batches[first:] if method == "sampa" else batches[first:-1]
    later(expected, plain.optimizer, plain.lr_scheduler, loss, last, rho=args.rho, max_norm=0.1)
    torch.testing.assert_close(dict(trainer.model.named_parameters()), dict(expected.named_parameters()))


def test_without_halves_it_is_trainer_bit_for_bit(tmp_path):
    """Of a sequential method, and where there is nothing to split."""
    for changes in ({"method": "sam"}, {"per_device_train_batch_size": 1}):
        args = tiny.arguments(tmp_path, sampa_start=4, max_steps=5, save_steps=4, save_strategy="steps", **changes)
        ours = SAMPaTrainer(model=tiny.bert(0.0), args=args, train_dataset=tiny.sentences(18))
        plain = Trainer(model=tiny.bert(0.0), args=args, train_dataset=tiny.sentences(18))
        found = []
        for trainer in (ours, plain):
            recorder = tiny.Recorder()
            trainer.add_callback(recorder)
            trainer.train()
            found.append(recorder.weights)
        assert tiny.differing(found[0][:4], found[1][:4]) == []
        assert tiny.differing(found[0][4], found[1][4]) != []


# ---- Halves ----


def micro_batch(rows: int, position: int = 0, halves: bool = True) -> MicroBatch:
    x, middle = torch.arange(rows)[:, None] + 10 * position, (rows + 1) // 2
    parts = [{"x": part, "labels": torch.zeros(len(part))} for part in (x[:middle], x[middle:])]
    whole = {"x": x, "labels": torch.zeros(rows)}
    return MicroBatch(whole, 0, position, share=0.5, halves=parts if halves and rows > 1 else None)


def weigh(batch: UpdateBatch) -> None:
    total = sum(each.size for each in batch)
    for each in batch:
        each.share = each.size / total


@pytest.mark.parametrize(
    ("sizes", "first", "second"),
    [
        ([4], [[0, 1]], [[2, 3]]),
        ([3], [[0, 1]], [[2]]),
        ([2, 2], [[0, 1]], [[10, 11]]),
        ([2, 2, 3], [[0, 1], [20, 21]], [[10, 11], [22]]),
        ([1], [[0]], None),
        ([2, 2, 1], [[0, 1], [20]], [[10, 11]]),
    ],
)
def test_halves_of_a_batch(sizes, first, second):
    view = SampleView(Exchange(Mesh(1, 0, paired=False)), None, weigh, None)
    batch = UpdateBatch([micro_batch(size, i) for i, size in enumerate(sizes)], 0, 0)
    halves = view.halves(batch)
    found = [[each.inputs["x"].flatten().tolist() for each in half] for half in halves]
    assert found[0] == first and sum(each.share for half in halves for each in half) == pytest.approx(1)
    if second is None:  # a pass of weight 0, which is left out
        (idle,) = halves[1]
        assert idle.share == 0.0 and not idle.counts
    else:
        assert found[1] == second
    places = [each.position for half in halves for each in half if each.counts]
    assert len(set(places)) == len(places)  # and so are their random numbers
    assert all(each.share == 0.5 for each in batch)  # as it was


def test_a_batch_that_nobody_has_halved_is_left_whole():
    view = SampleView(Exchange(Mesh(1, 0, paired=False)), None, weigh, None)
    first, second = view.halves(UpdateBatch([micro_batch(4, halves=False)], 0, 0))
    assert [each.size for each in first] == [4] and not any(each.counts for each in second)


def preferences(items):
    """The better half of pairs first, and things that all samples have in common."""
    ids = torch.stack([item["input_ids"] for item in items])
    labels = torch.tensor([item["labels"] for item in items])
    common = {"positions": torch.arange(4), "weights": torch.ones(4), "order": torch.randperm(len(items))}
    return {"input_ids": torch.cat([ids, ids.flip(1)]), "labels": labels, **common}


class Preferring(SAMPaTrainer):
    """What it counts is what it was given."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        better, worse = inputs["input_ids"].chunk(2)
        assert torch.equal(better.flip(1), worse) and len(better) == len(inputs["labels"])
        assert len(inputs["positions"]) == len(inputs["weights"]) == 4
        assert sorted(inputs["order"].tolist()) == list(range(len(better)))
        return super().compute_loss(model, {"input_ids": better, "labels": inputs["labels"]}, return_outputs)


@pytest.mark.parametrize("workers", [0, 2])
def test_halves_are_made_by_the_collator(tmp_path, workers):
    """As under DDP: what belongs together stays together, and what is no row is not cut."""
    args = tiny.arguments(
        tmp_path, sampa_start=3, max_steps=6, remove_unused_columns=False, dataloader_num_workers=workers
    )
    seen = tiny.Passes()

    class Watched(Preferring):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen(len(inputs["labels"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Watched(model=tiny.bert(), args=args, train_dataset=tiny.sentences(15), data_collator=preferences)
    trainer.train()
    own = seen.seen[tiny.REHEARSED :]
    assert own[:6] == [2] * 6  # the second half first
    assert own[6:] == [3] + [3, 4] + [4, 4] + [
        4,
        4,
    ]  # g_3 of the short last batch of the epoch, and three sharpness-aware steps
    assert not trainer._run.loader.collate_fn.in_halves


def test_one_process_shares_nothing_out_and_says_nothing(tmp_path, caplog):
    args = tiny.arguments(tmp_path, sampa_start=2, max_steps=3)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.Stream(16))
    with tiny.transformers_log(caplog):
        trainer.train()
    assert not any("shared out" in each for each in caplog.messages)


# ---- What it refuses and says ----


@pytest.mark.parametrize("start", [-1, -0.1, 1.5, float("nan"), float("inf"), True, "half"])
def test_a_start_that_is_neither_a_fraction_nor_a_step_is_refused(tmp_path, start):
    with pytest.raises(
        ValueError, match="sampa_start: expected a fraction of the steps, from 0 to below 1, or a whole"
    ):
        tiny.arguments(tmp_path, sampa_start=start)


def test_a_run_without_a_sharpness_aware_step_is_refused(tmp_path):
    args = tiny.arguments(tmp_path, sampa_start=5, max_steps=5)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    with pytest.raises(ValueError, match="or a step below the 5 of the run, got 5: no step would be sharpness-aware"):
        trainer.train()


def test_it_cannot_be_changed_on_the_way(tmp_path):
    args = tiny.arguments(tmp_path, sampa_start=2, max_steps=4)
    change = tiny.Each(lambda: setattr(args, "sampa_start", 3))
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16), callbacks=[change])
    with pytest.raises(ValueError, match="sampa_start"):
        trainer.train()


def test_log_and_card_say_which_steps_were_which(tmp_path):
    args = tiny.arguments(tmp_path, sampa_start=0.5, max_steps=6, logging_steps=2)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["plain_steps"] for line in lines] == [2, 3, 3]
    assert ["sharpness" in line for line in lines] == [False, True, True]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- sharpness-aware from step 4 on; the steps before it are those of the base optimizer alone" in card
    assert "sampa_start: 0.5" in card


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_floating_point_operations_are_those_of_the_passes(tmp_path, method):
    flos = []
    for start in (0, 3):
        args = tiny.arguments(tmp_path, method=method, sampa_start=start, max_steps=4)
        trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
        trainer.train()
        flos.append(trainer.state.total_flos)
    assert flos[1] / flos[0] == (3 + 2) / 8


class Counting(SAMPaTrainer):
    seen = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen += len(inputs["labels"])
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_what_a_trainer_counts_is_of_half_a_batch_and_it_is_told(tmp_path, caplog):
    args = tiny.arguments(tmp_path, sampa_start=2, max_steps=4)
    trainer = Counting(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    with tiny.transformers_log(caplog):
        trainer.train()
    assert trainer.seen == 2 * 2 + 2 * 4
    told = list({each for each in caplog.messages if "counts of itself" in each})
    assert len(told) == 1 and told[0].removeprefix("[RANK 0] ").startswith(
        "What Counting counts of itself (seen) is that of the first half of each batch until step 3"
    )


def test_a_changed_start_is_told_when_a_run_goes_on(tmp_path):
    settings = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps"}
    tiny.run(tmp_path, tiny.bert(), tiny.sentences(16), sampa_start=3, **settings)
    args = tiny.arguments(tmp_path, sampa_start=4, **settings)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("sampa_start" in sentence for sentence in trainer.continued)


@pytest.mark.parametrize(
    ("changes", "plain", "asked"),
    [({"sampa_start": 6}, 2, 7), ({"sampa_start": 0.5, "max_steps": 14}, 2, 8), ({"sampa_start": 1}, 2, 2)],
    ids=["later", "later, as the run is longer", "earlier than it was"],
)
def test_sharpness_aware_steps_that_have_begun_go_on(tmp_path, caplog, changes, plain, asked):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    whole = tiny.run(tmp_path, tiny.bert(), tiny.sentences(16), sampa_start=2, **settings)
    args = tiny.arguments(tmp_path / "out", **{**settings, **changes})
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    with tiny.transformers_log(caplog):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    told = {each.removeprefix("[RANK 0] ") for each in caplog.messages if "sampa_start: by" in each}
    assert told == {
        f"sampa_start: by {changes['sampa_start']:g} steps would be sharpness-aware from step {asked} on. In this run they are so "
        f"from step {plain + 1} on, because of the steps before the checkpoint."
    }
    lines = [line for line in trainer.state.log_history if "loss" in line and line["step"] > 4]
    assert {line["plain_steps"] for line in lines} == {plain} and all("sharpness" in line for line in lines)
    if "max_steps" not in changes:
        assert tiny.differing(whole["weights"], dict(trainer.model.named_parameters())) == []
    trainer.create_model_card()
    assert f"- sharpness-aware from step {plain + 1} on;" in (tmp_path / "out" / "README.md").read_text()


def test_steps_that_were_plain_stay_so_where_the_start_comes_earlier(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    tiny.run(tmp_path, tiny.bert(), tiny.sentences(16), sampa_start=6, **settings)
    args = tiny.arguments(tmp_path / "out", sampa_start=2, **settings)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["plain_steps"] for line in lines] == [1, 2, 3, 4, 4, 4, 4, 4]
    trainer.create_model_card()
    assert "- sharpness-aware from step 5 on;" in (tmp_path / "out" / "README.md").read_text()


class OneFeature(torch.nn.Module):
    """A net whose normalization cannot do with one sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8))

    def forward(self, pixel_values, labels=None):
        return {"loss": torch.nn.functional.cross_entropy(self.body(pixel_values), labels)}


@pytest.mark.parametrize("rest", [2, 3])
def test_a_rest_that_is_too_small_is_not_shared_out(tmp_path, rest):
    found = tiny.run(tmp_path, OneFeature(), tiny.images(8 + rest), sampa_start=4, max_steps=6)
    assert found["steps"] == 6


# ---- The benchmark ----


def test_the_benchmark_compares_runs_of_one_round():
    seconds = {"AdamW, DDP": [1.0, 2.0, 4.0], "SAMPa from 0.5 on": [1.5, 3.0, 10.0]}
    assert late_start.table(seconds).splitlines()[2:] == [
        "| AdamW, DDP | 2.00 | 1.00 | 1.00 - 1.00 |",
        "| SAMPa from 0.5 on | 3.00 | 1.50 | 1.50 - 2.50 |",
    ]


def test_a_run_of_the_benchmark_says_how_long_it_took(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\nstop\n"))
    late_start_worker.main("sampa", 0.5, 2, layers=1, hidden=32, batch=2, seq=4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0
