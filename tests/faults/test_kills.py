"""Processes that are killed at random moments, again and again: no checkpoint is lost, and the run ends with the same bits."""

from __future__ import annotations

import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_sampa.checkpoints import checkpoint
from tests import tiny
from tests.ranks import run_ranks, start_ranks


pytestmark = pytest.mark.distributed

SETTINGS = {
    "a pair": {},
    "sequential": {"method": "sam"},
    "a variant that remembers": {"variant": "vasso"},
    "a shared optimizer": {"shard_optimizer": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "one checkpoint at a time": {"save_total_limit": 1},
    "the best at the end": {
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "a worker that reads": {"dataloader_num_workers": 1},
    "weights alone beside": {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2},
}
STEPS = 8


class Ledger(TrainerCallback):
    """Notes the steps whose checkpoints are there, as far as the run knows."""

    def __init__(self, folder: Path):
        self.file = folder / "ledger"

    def on_save(self, args, state, control, **kwargs):
        if args.process_index == 0:
            with open(self.file, "a") as ledger:
                ledger.write(f"{state.global_step}\n")


def train(folder, name, resume=None):
    (Path(folder) / "begun").touch()
    kwargs = {"callbacks": [Ledger(Path(folder))], "eval_dataset": tiny.sentences(6, seed=2)}
    settings = {
        "max_steps": STEPS,
        "ddp_timeout": 10,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
        **SETTINGS[name],
    }
    return tiny.comparable(
        tiny.run(
            Path(folder) / "out",
            model=partial(tiny.bert, 0.1),
            dataset=tiny.sentences(22),
            resume=resume,
            trainer_kwargs=kwargs,
            **settings,
        )
    )


def saved(folder: Path) -> int:
    """The last step whose checkpoint the run has told of; 0 before the first."""
    ledger = folder / "ledger"
    return max(map(int, ledger.read_text().split()), default=0) if ledger.exists() else 0


def last_whole(folder: Path) -> int:
    """The step of the last whole checkpoint, 0 without one."""
    names = checkpoint.steps_in(folder / "out") if (folder / "out").exists() else []
    return next((int(name.partition("-")[2]) for name in names if checkpoint.is_whole(folder / "out" / name)), 0)


def kill_again_and_again(name, seed, folder, kills):
    """Start, kill one process or all at a random moment, and go on, until the run has ended; what came of it, and kills done."""
    rng, done = random.Random(f"{name} {seed}"), 0
    resume = None
    while done < kills:
        (folder / "begun").unlink(missing_ok=True)
        processes, *_store = start_ranks(train, 2, folder, name, resume, folder=folder / f"ranks{done}")
        while not (folder / "begun").exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.05, 1.0))
        for victim in rng.choice(([processes[0]], [processes[1]], processes)):
            victim.kill()
        for process in processes:
            process.join(60)
            assert not process.is_alive()
        done += 1
        resume = True if last_whole(folder) else None
        if saved(folder) == STEPS:  # at its end a run removes all but the best, if it is told to
            break
        assert last_whole(folder) >= saved(folder)
    return run_ranks(train, 2, folder, name, resume, folder=folder / "ranks"), done


def check(name, seeds, tmp_path, figure, kills=3):
    expected = run_ranks(train, 2, tmp_path / "whole", name, folder=tmp_path / "whole")
    for seed in seeds:
        found, done = kill_again_and_again(name, seed, tmp_path / str(seed), kills)
        differing = [
            each for whole, of_rank in zip(expected, found, strict=True) for each in tiny.differing(whole, of_rank)
        ]
        figure("kills", done, done if not differing else 0)
        assert differing == []
        shutil.rmtree(tmp_path / str(seed))


def test_killed_at_random(tmp_path, figure):
    check("one checkpoint at a time", [0], tmp_path, figure, kills=2)


@pytest.mark.whole
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_killed_at_random(tmp_path, name, figure):
    check(name, range(1, 5), tmp_path, figure)
