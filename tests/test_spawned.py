"""Workers that are started anew, as on macOS and Windows, instead of forked: what they are given travels as a pickle."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest

from hf_sampa import SAMPaTrainer
from tests import tiny
from tests.ranks import run_ranks


def kept_and_loaded(folder) -> bool:
    trainer = SAMPaTrainer(tiny.vit(), tiny.arguments(folder), train_dataset=tiny.NoisyImages(18))
    return (
        tiny.differing(dict(pickle.loads(pickle.dumps(trainer)).model.state_dict()), trainer.model.state_dict()) == []
    )


def test_a_trainer_is_pickled_as_plain_trainer_is(tmp_path):
    """Before its first run; after that accelerate's references to loaders, which no pickle takes, are in both."""
    assert run_ranks(kept_and_loaded, 1, tmp_path, folder=tmp_path) == [True]


@pytest.mark.whole
@pytest.mark.parametrize("persistent", [False, True])
def test_spawned_workers_read_what_is_read_without_any(tmp_path, persistent):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        alone, spawned = (
            tiny.run(
                tmp_path,
                tiny.vit(),
                tiny.NoisyImages(18),
                dataloader_num_workers=workers,
                dataloader_persistent_workers=persistent and workers > 0,
            )
            for workers in (0, 2)
        )
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert tiny.differing(alone["weights"], spawned["weights"]) == []
