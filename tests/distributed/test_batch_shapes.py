"""P6: K micro-batches of b, one batch of K b, and k replicas of b K / k give the same run, to rounding."""

from __future__ import annotations

import datasets
import pytest
import torch

from tests import tiny
from tests.division import divided
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

RAGGED, EVEN = 26, 24


def with_a_batch_of_ignored_labels() -> list[dict]:
    items = tiny.tagged_sentences(RAGGED)
    return [{**item, "labels": torch.full((8,), -100)} if 8 <= i < 16 else item for i, item in enumerate(items)]


MODELS = {
    "bert": (tiny.bert, tiny.sentences(RAGGED)),
    "vit": (tiny.vit, tiny.images(RAGGED)),
    "token-level bert": (tiny.token_bert, tiny.tagged_sentences(RAGGED)),
    "a batch without labels": (tiny.token_bert, with_a_batch_of_ignored_labels()),
    "regression": (tiny.regression_bert, tiny.scored_sentences(RAGGED)),
}
# (samples, processes, batch per device, accumulation) for update batches of 8. With several replicas accelerate fills
# the last batch of an epoch up with samples from its start, so that only even epochs compare.
SHAPES = {
    "sampa": [(RAGGED, 1, 2, 4), (EVEN, 4, 4, 1), (EVEN, 4, 2, 2)],
    "sam": [(RAGGED, 1, 2, 4), (EVEN, 2, 4, 1), (EVEN, 4, 2, 1)],
}
CASES = [(method, *shape) for method, shapes in SHAPES.items() for shape in shapes]
# Replicas with micro-batches are replicas; four of them are as two.
WHOLE = {("sampa", EVEN, 4, 4, 1), ("sam", EVEN, 4, 2, 1)}


def trained(folder, method, samples, batch_size, accumulation) -> dict:
    return {
        name: tiny.run(
            folder,
            model,
            dataset[:samples],
            method=method,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            include_num_input_tokens_seen="no" if name == "vit" else "all",
        )
        for name, (model, dataset) in MODELS.items()
    }


@pytest.fixture(scope="module")
def outcomes(chosen, tmp_path_factory):
    folder, cases = tmp_path_factory.mktemp("shapes"), chosen("case")
    one_batch = [(method, samples, 1, 8, 1) for method in SHAPES for samples in (RAGGED, EVEN)]
    one_batch = [case for case in one_batch if any(case[:2] == other[:2] for other in cases)]
    return {
        case: run_ranks(trained, n, folder, method, samples, b, a, folder=folder / "-".join(map(str, case)))
        for case in cases + one_batch
        for method, samples, n, b, a in [case]
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", divided(CASES, WHOLE), ids=str)
def test_every_shape_of_a_batch_is_the_same_batch(outcomes, case, name):
    method, samples, *_ = case
    expected, found = outcomes[method, samples, 1, 8, 1][0][name], outcomes[case][0][name]
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    assert found["steps"] == expected["steps"] == (8 if samples == RAGGED else 6)
    assert found["tokens"] == expected["tokens"]
    for line, other in zip(found["logs"], expected["logs"], strict=True):
        # Trainer counts the epoch in micro-batches, which a ragged epoch has more of.
        assert line == pytest.approx({**other, "epoch": line["epoch"]}, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", divided([case for case in CASES if case[2] > 1], WHOLE), ids=str)
def test_all_ranks_hold_the_same_bits(outcomes, case, name):
    first, *others = outcomes[case]
    for other in others:
        assert tiny.differing(first[name], other[name]) == []


def files_of_sentences(folder):
    """An iterable `datasets` table of two files of unequal length, read once per epoch and scored after each."""
    rows = [{"input_ids": item["input_ids"].tolist(), "labels": item["labels"]} for item in tiny.sentences(RAGGED)]
    files = {"rows": [rows[:9], rows[9:]]}
    table = datasets.IterableDataset.from_generator(tiny.rows_of_files, gen_kwargs=files)
    settings = {"max_steps": 9, "save_strategy": "epoch", "eval_strategy": "epoch", "ddp_timeout": 60}
    kwargs = {"eval_dataset": tiny.sentences(4)}
    sampa, sam = (
        tiny.run(folder / method, tiny.bert, table, method=method, trainer_kwargs=kwargs, **settings)
        for method in ("sampa", "sam")
    )
    return sampa, sam


@pytest.mark.parametrize("n", divided([2, 4], whole=[2]))
def test_replicas_of_an_iterable_dataset_of_several_files(tmp_path, n):
    first, *others = run_ranks(files_of_sentences, n, tmp_path, folder=tmp_path)
    for other in others:
        assert tiny.differing(first, other) == []
    assert [outcome["steps"] for outcome in first] == [9, 9]
