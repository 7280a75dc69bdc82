"""P2, P3, P5 with what is put around a model: compilation, checkpointed layers, adapters, tied weights, autocast."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from tests import models, tiny
from tests.division import divided
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

BERT = {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(14)}
ACCUMULATION = {"gradient_accumulation_steps": 2}
SCENARIOS = {
    # Batches of one shape: a ragged one would be compiled once more.
    "compiled": {"model": models.Perceptron, "dataset": tiny.images(16), **models.COMPILED},
    "compiled BERT": {"model": models.compiled_bert, "dataset": tiny.sentences(16), **models.COMPILED},
    "compiled by inductor": {
        "model": models.Perceptron,
        "dataset": tiny.images(16),
        **models.COMPILED,
        "torch_compile_backend": "inductor",
    },
    "checkpointed layers, accumulation": {**BERT, **models.CHECKPOINTED, **ACCUMULATION},
    "checkpointed layers, reentrant": {**BERT, **models.CHECKPOINTED_REENTRANT},
    "adapters": {"model": models.lora_bert, "dataset": tiny.sentences(14)},
    "adapters, checkpointed layers, accumulation": {
        "model": models.lora_bert,
        "dataset": tiny.sentences(19),
        **models.CHECKPOINTED,
        **ACCUMULATION,
    },
    "frozen embeddings": {"model": models.frozen_bert, "dataset": tiny.sentences(14)},
    "tied weights": {"model": models.masked_bert, "dataset": models.texts(14)},
    "tied weights in two buckets, accumulation": {
        "model": models.gpt2_of_two_buckets,
        "dataset": models.texts(19),
        **ACCUMULATION,
    },
    "shared layers": {"model": models.albert, "dataset": tiny.sentences(14)},
    "shared layers, checkpointed, accumulation": {
        "model": models.checkpointed_albert,
        "dataset": tiny.sentences(19),
        **ACCUMULATION,
    },
    "batch norm, accumulation": {"model": tiny.BatchNormNet, "dataset": tiny.images(19), **ACCUMULATION},
    "buffers of its own": {"model": models.Drifting, "dataset": tiny.images(14)},
    "spectral norm": {"model": models.Spectral, "dataset": tiny.images(14)},
    "branches": {"model": models.Branches, "dataset": tiny.images(14)},
    "branches, accumulation": {"model": models.Branches, "dataset": tiny.images(19), **ACCUMULATION},
    "bf16": {**BERT, "bf16": True},
}
if not shutil.which("g++"):
    del SCENARIOS["compiled by inductor"]
# Others have these in them, or as much.
WHOLE = {
    *{"compiled by inductor"}.intersection(SCENARIOS),
    "compiled BERT",
    "checkpointed layers, accumulation",
    "adapters",
    "tied weights",
    "shared layers",
    "batch norm, accumulation",
    "branches",
}
on_every_scenario = pytest.mark.parametrize("name", divided(SCENARIOS, WHOLE))
STEPS, SAVE_STEPS = 5, 2  # epochs are of 4, 3 or 2 steps
# By (processes that wrote the checkpoint, processes that go on): the step at which.
RESUMED_AT = {(1, 1): 4, (2, 2): 2, (1, 2): 2, (2, 1): 4}


def runs(folder, names, n, to_write, to_resume) -> dict:
    """Outcomes on `n` processes, by scenario and by how many processes wrote the checkpoint, 0 without one."""
    outcomes = {}
    for name in names:
        own = {**SCENARIOS[name], "max_steps": STEPS}
        if to_write:
            output_dir = folder / f"{n}" / name
            outcomes[name, 0] = tiny.run(output_dir, **own, save_strategy="steps", save_steps=SAVE_STEPS)
        for wrote in to_resume:
            written = folder / f"{wrote}" / name / f"checkpoint-{RESUMED_AT[wrote, n]}"
            outcomes[name, wrote] = tiny.run(folder / "out", **own, resume=str(written))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(chosen, tmp_path_factory):
    """What `runs` returned, by number of processes and rank."""
    folder, names = tmp_path_factory.mktemp("around"), chosen("name")
    (one,) = run_ranks(runs, 1, folder, names, 1, True, [1], folder=folder / "first")
    two = run_ranks(runs, 2, folder, names, 2, True, [1, 2], folder=folder / "second")
    (one_later,) = run_ranks(runs, 1, folder, names, 1, False, [2], folder=folder / "third")
    shutil.rmtree(folder)
    return {1: [one | one_later], 2: two}


@on_every_scenario
def test_two_processes_are_one(outcomes, name):
    one, two = outcomes[1][0][name, 0], outcomes[2][0][name, 0]
    assert one["steps"] == STEPS
    assert tiny.differing(one, two) == []


@on_every_scenario
def test_both_ranks_hold_the_same_bits(outcomes, name):
    """Running statistics included."""
    assert tiny.differing(*(of_rank[name, 0] for of_rank in outcomes[2])) == []


@pytest.mark.parametrize(("wrote", "n"), RESUMED_AT)
@on_every_scenario
def test_resumed_is_never_stopped(outcomes, name, wrote, n):
    expected = tiny.comparable(outcomes[wrote][0][name, 0])
    for of_rank in outcomes[n]:
        assert tiny.differing(expected, tiny.comparable(of_rank[name, wrote])) == []


class Traffic(TrainerCallback):
    """Bytes that this process had sent, after every step."""

    def __init__(self):
        self.sent: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.sent.append(self.trainer.sampa.exchange.bytes_sent)


def sent_per_step(folder):
    traffic = Traffic()
    trainer = SAMPaTrainer(
        model=models.lora_bert(),
        args=tiny.arguments(folder, max_steps=4, gradient_accumulation_steps=2),
        train_dataset=tiny.sentences(16),
        callbacks=[traffic],
    )
    traffic.trainer = trainer
    trainer.train()
    trainable = sum(param.numel() for param in trainer.model.parameters() if param.requires_grad)
    return trainable, [after - before for before, after in zip(traffic.sent[:-1], traffic.sent[1:], strict=True)]


def test_adapters_alone_are_sent(tmp_path):
    """Four bytes a trainable number, however many micro-batches."""
    for trainable, sent in run_ranks(sent_per_step, 2, tmp_path, folder=tmp_path / "ranks"):
        assert sent == [4 * trainable] * 3
