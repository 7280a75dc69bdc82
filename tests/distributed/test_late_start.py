"""Sharpness-aware steps that begin late: before them two processes are plain data parallelism, and one process all the same."""

from __future__ import annotations

import io
import logging
from functools import partial

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests import sharded, tiny
from tests.distributed.test_resume import by_worlds
from tests.division import divided_tuples
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

START = 3  # of at least five steps
SCENARIOS = {
    "dropout, ragged last batch": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(17)},
    "two micro-batches, group cut short": {
        "model": partial(tiny.bert, 0.1),
        "dataset": tiny.sentences(19),
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
    },
    "three micro-batches": {
        "model": partial(tiny.bert, 0.1),
        "dataset": tiny.Stream(14),
        "gradient_accumulation_steps": 3,
        "max_steps": 6,
    },
    "labels that do not count": {"model": partial(tiny.token_bert, 0.1), "dataset": tiny.tagged_sentences(18)},
    "batch norm": {"model": tiny.BatchNormNet, "dataset": tiny.images(18)},
    "single samples": {"model": tiny.bert, "dataset": tiny.sentences(6), "per_device_train_batch_size": 1},
    "asam, sgd": {
        "model": tiny.bert,
        "dataset": tiny.sentences(18),
        "variant": "asam",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    },
    "a variant with a state": {"model": tiny.bert, "dataset": tiny.sentences(18), "variant": "vasso"},
    "losses of single samples": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(18), "variant": "bisam"},
    "shards": {"model": tiny.bert, "dataset": tiny.sentences(18), "variant": "msam", "variant_args": {"size": 2}},
    "no overlap": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(18), "overlap_exchange": False},
    "shared optimizer": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(18), "shard_optimizer": True},
    "sam": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(18), "method": "sam"},
}
RESUMED_AT = (2, 3, 4)  # before the first sharpness-aware step, right before it, and after it


def never_stopped(folder) -> dict:
    return {
        name: tiny.run(folder / name, **scenario, sampa_start=START, save_strategy="steps", save_steps=1)
        for name, scenario in SCENARIOS.items()
    }


def resumed(folder, written, cases) -> dict:
    return {
        (name, step): tiny.run(
            folder / "out", **SCENARIOS[name], sampa_start=START, resume=str(written / name / f"checkpoint-{step}")
        )
        for name, step in cases
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("late")
    return {n: run_ranks(never_stopped, n, folder / f"checkpoints{n}", folder=folder / str(n)) for n in (1, 2)}, folder


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "sam"])  # of which a process is a replica
def test_two_processes_are_one(whole, name):
    one, (two, other) = whole[0][1][0][name], [of_rank[name] for of_rank in whole[0][2]]
    assert one["steps"] > START + 1
    if name == "shared optimizer":  # of which each process has a part
        one, two, other = (
            {**each, "logs": tiny.without_cosine(each["logs"]), "optimizer": None} for each in (one, two, other)
        )
    assert tiny.differing(two, other) == []
    assert tiny.differing(one, two) == []


@pytest.fixture(scope="module")
def continued(whole, chosen, tmp_path_factory):
    return by_worlds(resumed, whole[1], chosen, tmp_path_factory.mktemp("continued"))


SHOWN = ("two micro-batches, group cut short", "a variant with a state", "shared optimizer", "sam")
CASES = [
    (name, step, wrote, n)
    for name in SCENARIOS
    for step in RESUMED_AT
    for wrote, n in ((2, 2), (1, 2), (2, 1))
    if wrote == n or name not in ("sam", "shared optimizer")
    if step == START or name in SHOWN
]


@pytest.mark.parametrize(
    ("name", "step", "wrote", "n"), divided_tuples(CASES, [case for case in CASES if case[0] not in SHOWN])
)
def test_resumed_is_never_stopped(whole, continued, name, step, wrote, n):
    expected, found = whole[0][wrote][0][name], continued[wrote, n][0][name, step]
    assert tiny.differing(tiny.comparable(expected), tiny.comparable(found)) == []


# ---- What Trainer does under DDP ----


class Net(nn.Module):
    """Not one of transformers' heads, whose losses Trainer does not divide by the accumulation steps (transformers #47688)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, pixel_values, labels=None):
        return {"loss": nn.functional.cross_entropy(self.body(pixel_values), labels)}


def late(folder, settings) -> dict:
    return tiny.run(folder / "ours", Net, tiny.images(32), **settings, sampa_start=4)


def under_ddp(folder, settings) -> dict:
    ours = tiny.arguments(folder / "ddp", **settings).to_dict()
    own = {name: ours[name] for name in ("output_dir", "use_cpu", "learning_rate", "weight_decay", "logging_steps")}
    own |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 2}
    args = TrainingArguments(**own, **settings)
    return tiny.outcome(Trainer(model=Net(), args=args, train_dataset=tiny.images(32)))


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_before_it_a_step_is_that_of_trainer_under_ddp(tmp_path, accumulation):
    """The same samples in an update batch, dealt out to two processes; to rounding, which AdamW makes larger."""
    settings = {
        "train_sampling_strategy": "sequential",
        "max_steps": 5,
        "gradient_accumulation_steps": accumulation,
    }
    ours = run_ranks(late, 2, tmp_path, settings, folder=tmp_path / "ranks")[0]["logs"]
    ddp = run_ranks(under_ddp, 2, tmp_path, settings, folder=tmp_path / "other")[0]["logs"]
    for step, (line, of_ddp) in enumerate(zip(ours[:4], ddp[:4], strict=True), start=1):
        assert line["plain_steps"] == step and "sharpness" not in line
        assert line["loss"] == pytest.approx(of_ddp["loss"], abs=1e-4)  # which Trainer rounds
        assert line["grad_norm"] == pytest.approx(of_ddp["grad_norm"], rel=1e-4)
        assert line["learning_rate"] == of_ddp["learning_rate"]
    assert ours[4]["plain_steps"] == 4 and ours[4]["sharpness"] > 0


# ---- Several pairs, and shards ----


def of_four_samples(folder, changes) -> dict:
    """Update batches of four samples; as `sharded.outcome`."""
    settings = {"max_steps": 8, "sampa_start": START, **changes}
    return sharded.outcome(sharded.trainer(folder, tiny.bert, tiny.sentences(40), settings))


ON_FOUR = {"two pairs": {}, "two pairs, one optimizer": {"shard_optimizer": True}}
ON_SHARDS = {"shards": sharded.FSDP, "shards, one optimizer": {**sharded.FSDP, "shard_optimizer": True}}


@pytest.mark.parametrize(
    "changes",
    [pytest.param(each, id=name) for name, each in ON_FOUR.items()]
    + [pytest.param(each, id=name, marks=sharded.needs_versions) for name, each in ON_SHARDS.items()],
)
def test_two_pairs_are_one_process_with_their_samples(tmp_path, changes):
    (alone,) = run_ranks(of_four_samples, 1, tmp_path, {}, folder=tmp_path / "one")
    four = run_ranks(
        of_four_samples, 4, tmp_path, {**changes, "per_device_train_batch_size": 2}, folder=tmp_path / "four"
    )
    for found in four:
        assert 0 < sharded.deviation(found["weights"], alone["weights"]) < 1e-6
        assert tiny.differing(found, four[0]) == []


@sharded.needs_versions
def test_two_roles_of_one_shard_are_the_unsharded_pair(tmp_path):
    """Bit for bit, with a batch that one of the halves has no part of."""
    settings = {"max_steps": 8, "per_device_train_batch_size": 3}  # the last batch of the epoch is one sample
    whole = run_ranks(of_four_samples, 2, tmp_path, settings, folder=tmp_path / "whole")
    for found in run_ranks(of_four_samples, 2, tmp_path, {**settings, **sharded.FSDP}, folder=tmp_path / "shard"):
        pair = [{**each, "shards": None, "logs": tiny.without_cosine(each["logs"])} for each in (found, whole[0])]
        assert tiny.differing(*pair) == []


def told(folder) -> list[str]:
    lines, logger = io.StringIO(), logging.getLogger("hf_sampa")
    handler = logging.StreamHandler(lines)
    logger.addHandler(handler)
    tiny.run(folder, tiny.bert(), tiny.Stream(16), sampa_start=2, max_steps=3)
    logger.removeHandler(handler)
    return [each for each in lines.getvalue().splitlines() if "shared out" in each]


def test_a_batch_that_is_not_shared_out_is_told_once(tmp_path):
    of_first, of_other = run_ranks(told, 2, tmp_path / "out", folder=tmp_path)
    assert len(of_first) == 1 and not of_other
    assert (
        "Step 1: its last micro-batch cannot be shared out. It is one sample, or no dict that a collator"
        in of_first[0]
    )
