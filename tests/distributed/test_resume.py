"""P5: stopped at any step and resumed is never stopped, bit for bit, on one process, on two, and from one to the other."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from hf_sampa import SAMPaTrainer
from tests import tiny
from tests.division import divided_tuples
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

SCENARIOS = {
    "dropout, accumulation, group cut short": {
        "model": partial(tiny.bert, 0.1),
        "dataset": tiny.sentences(19),
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
    },
    "augmentation": {"model": partial(tiny.vit, 0.1), "dataset": tiny.NoisyImages(14), "lmbda": 0.0},
    "iterable of unknown length": {
        "model": partial(tiny.bert, 0.1),
        "dataset": tiny.Stream(14),
        "gradient_accumulation_steps": 3,
        "max_steps": 6,
    },
    "group_by_length, sgd": {
        "model": tiny.bert,
        "dataset": tiny.sentences(18, lengths=(3, 12)),
        "train_sampling_strategy": "group_by_length",
        "trainer_kwargs": {"data_collator": tiny.Mean()},
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    },
    "batch norm": {"model": tiny.BatchNormNet, "dataset": tiny.images(18)},
    "sam": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(18), "method": "sam"},
}
RESUMED_AT = (1, 3, 4)  # the runs have five or more steps; the first epochs end after 2, 3, 4 or 5


def never_stopped(folder) -> dict:
    return {
        name: tiny.run(folder / name, **scenario, save_strategy="steps", save_steps=1)
        for name, scenario in SCENARIOS.items()
    }


def resumed(folder, written, cases) -> dict:
    return {
        (name, step): tiny.run(folder / "out", **SCENARIOS[name], resume=str(written / name / f"checkpoint-{step}"))
        for name, step in cases
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs left alone, by number of processes, and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    outcomes = {}
    for n in (1, 2):
        outcomes[n] = run_ranks(never_stopped, n, folder / f"checkpoints{n}", folder=folder / str(n))
    yield outcomes, folder
    shutil.rmtree(folder)


def by_worlds(resumed, written, chosen, folder) -> dict:
    """What `resumed` makes, on `n` processes, of the chosen cases whose checkpoints `wrote` processes wrote, by (wrote, n)."""
    cases = {}
    for name, step, *worlds in chosen("name", "step", "wrote", "n"):
        cases.setdefault(tuple(worlds), []).append((name, step))
    return {
        (wrote, n): run_ranks(
            resumed, n, folder, written / f"checkpoints{wrote}", of_worlds, folder=folder / f"{wrote}to{n}"
        )
        for (wrote, n), of_worlds in cases.items()
    }


@pytest.fixture(scope="module")
def continued(whole, chosen, tmp_path_factory):
    """Runs resumed on `n` processes from what `wrote` processes wrote, by (wrote, n)."""
    return by_worlds(resumed, whole[1], chosen, tmp_path_factory.mktemp("continued"))


CASES = [
    (name, step, wrote, n)
    for name in SCENARIOS
    for step in RESUMED_AT
    for wrote, n in ((1, 1), (2, 2), (1, 2), (2, 1))
    # SAM is data parallel on two processes: other batches than on one.
    if name != "sam" or wrote == n
]
# At every step of one scenario, and of the others within an epoch.
WHOLE = [case for case in CASES if case[0] != "augmentation" and case[1] != 3]


@pytest.mark.parametrize(("name", "step", "wrote", "n"), divided_tuples(CASES, WHOLE))
def test_resumed_is_never_stopped(whole, continued, name, step, wrote, n):
    expected, found = whole[0][wrote][0][name], continued[wrote, n][0][name, step]
    assert expected["steps"] > max(RESUMED_AT)
    assert tiny.differing(tiny.comparable(expected), tiny.comparable(found)) == []


PAIRS = {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(30), "gradient_accumulation_steps": 2}


def two_pairs(folder) -> tuple[dict, dict]:
    whole = tiny.run(folder, **PAIRS, save_strategy="steps", save_steps=3)
    return whole, tiny.run(folder / "out", **PAIRS, resume=str(folder / "checkpoint-3"))


def test_two_pairs_resume(tmp_path):
    for whole, again in run_ranks(two_pairs, 4, tmp_path, folder=tmp_path / "ranks"):
        assert whole["steps"] == 4
        assert tiny.differing(tiny.comparable(whole), tiny.comparable(again)) == []


class Counting(SAMPaTrainer):
    """Keeps the sum of what it has read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.read += int(inputs["input_ids"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def counted(folder) -> list[int]:
    found = []
    for resume in (None, str(folder / "checkpoint-2")):
        args = tiny.arguments(folder, method="sam", max_steps=4, save_strategy="steps", save_steps=2)
        trainer = Counting(tiny.bert(), args, train_dataset=tiny.sentences(32))
        trainer.train(resume_from_checkpoint=resume)
        found.append(trainer.read)
    return found


def test_every_replica_goes_on_with_what_it_has_collected(tmp_path):
    (one, resumed_one), (other, resumed_other) = run_ranks(counted, 2, tmp_path / "out", folder=tmp_path / "ranks")
    assert (resumed_one, resumed_other) == (one, other) and one != other


def trained_twice(folder) -> dict:
    args = tiny.arguments(folder, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = SAMPaTrainer(tiny.bert(), args, train_dataset=tiny.sentences(16))
    trainer.train()
    return tiny.outcome(trainer)


def test_after_a_run_that_saved_another_one_begins(tmp_path):
    """Whoever saves the model writes into its config what it is: on one of the processes."""
    one, other = run_ranks(trained_twice, 2, tmp_path / "out", folder=tmp_path / "ranks")
    assert one["steps"] == 2 and tiny.differing(one, other) == []
