"""P2, P3: several processes are one serial optimizer, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest

from tests import tiny
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

SCENARIOS = {
    "dropout, ragged last batch": {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(18)},
    "accumulation, group cut short": {
        "model": partial(tiny.bert, 0.1),
        "dataset": tiny.sentences(19),
        "gradient_accumulation_steps": 3,
        "include_num_input_tokens_seen": "all",
    },
    "max_steps inside an epoch": {
        "model": tiny.bert,
        "dataset": tiny.sentences(20),
        "max_steps": 7,
        "logging_steps": 3,
    },
    "augmentation, workers": {
        "model": partial(tiny.vit, 0.1),
        "dataset": tiny.NoisyImages(14),
        "dataloader_num_workers": 2,
    },
    "iterable of unknown length, accumulation": {
        "model": partial(tiny.bert, 0.1),
        "dataset": tiny.Stream(14),
        "gradient_accumulation_steps": 3,
        "max_steps": 5,
    },
    "group_by_length": {
        "model": tiny.bert,
        "dataset": tiny.sentences(18, lengths=(3, 12)),
        "train_sampling_strategy": "group_by_length",
        "trainer_kwargs": {"data_collator": tiny.Mean()},
    },
    "sgd, no clipping, lambda 0": {
        "model": tiny.bert,
        "dataset": tiny.sentences(16),
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 0.0,
        "lmbda": 0.0,
    },
    "fused adamw, cosine, warm-up": {
        "model": tiny.bert,
        "dataset": tiny.sentences(16),
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    },
    "an optimizer without a closed form": {"model": tiny.bert, "dataset": tiny.sentences(16), "optim": "rmsprop"},
    "batch norm": {"model": tiny.BatchNormNet, "dataset": tiny.images(18)},
    "frozen layer, lambda 1": {"model": partial(tiny.frozen_bert), "dataset": tiny.sentences(16), "lmbda": 1.0},
}


def all_scenarios(folder) -> dict:
    return {name: tiny.run(folder / "out", **scenario) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {n: run_ranks(all_scenarios, n, folder, folder=folder / str(n)) for n in (1, 2)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_one(outcomes, name):
    one, two = outcomes[1][0][name], outcomes[2][0][name]
    assert one["steps"] > 3
    assert tiny.differing(one, two) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_ranks_hold_the_same_bits(outcomes, name):
    assert tiny.differing(outcomes[2][0][name], outcomes[2][1][name]) == []
