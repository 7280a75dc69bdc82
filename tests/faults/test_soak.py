"""A long run holds no more memory, threads and open files at its end than after its beginning."""

from __future__ import annotations

import gc
from functools import partial

import psutil
import pytest
from transformers import TrainerCallback

from tests import tiny
from tests.ranks import run_ranks


EVERY = 100
MEGABYTE = 2**20


class Meter(TrainerCallback):
    """What the process holds, every so many steps: bytes of its own, threads, open files, children."""

    def __init__(self):
        self.rows: list[tuple[int, int, int, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            gc.collect()
            process = psutil.Process()
            held = process.memory_full_info().uss
            self.rows.append((held, process.num_threads(), process.num_fds(), len(process.children())))


def soak(folder, steps, settings):
    meter = Meter()
    tiny.run(
        folder,
        model=partial(tiny.bert, 0.1),
        dataset=tiny.sentences(64),
        trainer_kwargs={"callbacks": [meter], "eval_dataset": tiny.sentences(16, seed=3)},
        **{
            "max_steps": steps,
            "logging_steps": 50,
            "save_strategy": "steps",
            "save_steps": EVERY,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": EVERY,
            **settings,
        },
    )
    return meter.rows


@pytest.mark.whole
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("steps", "settings"), [(5000, {}), (2000, {"variant": "vasso", "dataloader_num_workers": 1})]
)
def test_nothing_grows(tmp_path, steps, settings, figure):
    for rows in run_ranks(soak, 2, tmp_path, steps, settings, folder=tmp_path / "ranks", timeout=800):
        begun = rows[steps * 2 // 5 // EVERY :]
        for counts in zip(*[row[1:] for row in begun], strict=True):
            assert len(set(counts)) == 1
        # The log grows, and the allocator keeps some pages: 1.2 MB were seen.
        assert begun[-1][0] - begun[0][0] < 3 * MEGABYTE
    figure("steps without growth", steps, steps)
