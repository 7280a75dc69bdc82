"""Checkpoints that two processes write at any moment, and how processes end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

import hf_sampa
from hf_sampa import SAMPaTrainer
from hf_sampa.checkpoints import checkpoint
from tests import tiny
from tests.distributed.test_failures import rank
from tests.division import divided
from tests.ranks import run_ranks, start_ranks
from tests.test_saving import Does, bytes_of, interrupt, outcome, save, steps_saved, trainer_of


pytestmark = pytest.mark.distributed


def losses(outcome) -> list:
    """What was logged but for evaluations, which processes share."""
    return tiny.without_cosine([line for line in outcome["logs"] if "loss" in line])


def alone(folder) -> dict:
    return outcome(trainer_of(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process that never saved; in a process of its own, which computes on one thread."""
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks(alone, 1, folder, folder=folder / "ranks")[0]


EVENTS = ("on_train_begin", "on_step_begin", "on_optimizer_step", "on_epoch_begin")


def saved_everywhere(folder, first) -> dict:
    """What a run ends with that is saved at several events, and those that go on from its checkpoints.

    Every other run shares its optimizer, the first one if `first` says so.
    """
    found = {}
    for step, event in enumerate(EVENTS):
        shared = (step % 2 == 0) is first
        trainer = trainer_of(folder / event, shard_optimizer=shared)
        trainer.add_callback(Does(event, step, lambda trainer=trainer: save(trainer)))
        found[event, "never stopped"] = outcome(trainer)
        assert len(steps_saved(folder / event)) == 1
        found[event, "resumed"] = outcome(trainer_of(folder / event, shard_optimizer=shared), True)
    return found


@pytest.mark.parametrize("first", divided([False, True], whole=[True]))
def test_saved_in_callbacks_by_two_processes(tmp_path, whole, first):
    for of_rank in run_ranks(saved_everywhere, 2, tmp_path, first, folder=tmp_path / "ranks"):
        for name, found in of_rank.items():
            assert tiny.differing(whole["weights"], found["weights"]) == [], name
            assert tiny.differing(losses(whole), losses(found)) == [], name


def interrupted(folder) -> list:
    """Saved by hand after an exception on both processes, which had cut what they were sending; and again."""
    found = []
    for event in ("on_step_end", "on_pre_optimizer_step"):
        stopped = trainer_of(folder, callbacks=[Does(event, 3, interrupt)], save_strategy="steps", save_steps=2)
        try:
            stopped.train()
        except KeyboardInterrupt:
            pass
        try:
            save(stopped)
            save(stopped)
        except RuntimeError as error:
            found.append(str(error))
    return [*found, outcome(trainer_of(folder), True)["weights"]]


def test_saved_after_an_interrupt_of_two_processes(tmp_path, whole):
    refused, weights = run_ranks(interrupted, 2, tmp_path, folder=tmp_path / "ranks")[0]
    assert "interrupted within the optimizer's step" in refused
    assert steps_saved(tmp_path) == [2, 3] and (tmp_path / "checkpoint-3" / "rng_state_1.pth").exists()
    assert tiny.differing(whole["weights"], weights) == []


def after_different_steps(folder) -> str:
    stopped = trainer_of(folder, ddp_timeout=10, callbacks=[Does("on_step_end", 1, interrupt)])
    try:
        stopped.train()
    except KeyboardInterrupt:
        stopped.state.global_step += rank()
    try:
        save(stopped)
    except RuntimeError as error:
        return str(error)


def test_processes_that_stopped_after_different_steps(tmp_path):
    for message in run_ranks(after_different_steps, 2, tmp_path, folder=tmp_path / "ranks"):
        assert "it was interrupted after different steps, [1, 2], on its processes" in message
    assert steps_saved(tmp_path) == []


class Asks(TrainerCallback):
    """Has transformers save at the next event, as a signal does, at one event of one process."""

    def __init__(self, of_rank, event, step):
        self.of_rank, self.step, self.manager = of_rank, step, None
        setattr(self, event, self.asked)

    def asked(self, args, state, control, **kwargs):
        if rank() == self.of_rank and state.global_step == self.step:
            self.manager.is_checkpoint_requested = True


def terminated(folder) -> dict:
    found = {}
    for of_rank, event in ((0, "on_step_begin"), (1, "on_step_end"), (1, "on_substep_end"), (0, "on_epoch_end")):
        own = folder / f"{of_rank}{event}"
        trainer = trainer_of(own, enable_jit_checkpoint=True, ddp_timeout=20)
        asks = Asks(of_rank, event, 3)
        asks.manager = next(e.jit_manager for e in trainer.callback_handler.callbacks if hasattr(e, "jit_manager"))
        trainer.callback_handler.callbacks.insert(0, asks)
        trainer.train()
        assert not list(own.rglob("checkpoint-is-incomplete.txt"))
        found[of_rank, event] = trainer.state.global_step, steps_saved(own), outcome(trainer_of(own), True)["weights"]
    return found


def test_sigterm_that_reaches_one_process_first(tmp_path, whole):
    """All save and stop after one and the same step."""
    found = run_ranks(terminated, 2, tmp_path, folder=tmp_path / "ranks")
    expected = whole["weights"]
    for of_rank in found:
        for (_, event), (stopped, saved, weights) in of_rank.items():
            step = 3 if event in ("on_step_end", "on_epoch_end") else 4
            assert (stopped, saved) == (step, [step])
            assert tiny.differing(expected, weights) == []


class Dies(SAMPaTrainer):
    """Is killed while it writes checkpoint-4."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == 4 and self.args.should_save:
            os._exit(9)
        super()._save_optimizer_and_scheduler(output_dir)


def killed_while_writing(folder):
    trainer_of(folder, save_strategy="steps", save_steps=2).train()
    trainer_of(folder, Dies, save_strategy="steps", save_steps=2, ddp_timeout=10).train(str(folder / "checkpoint-2"))


def resumed(folder, name):
    return outcome(trainer_of(folder), name if name is True else str(folder / name))["weights"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_while_a_checkpoint_is_written_anew(tmp_path, whole, world_size):
    folder = tmp_path / "out"
    processes, *_ = start_ranks(killed_while_writing, world_size, folder, folder=tmp_path / "ranks")
    for process in processes:
        process.join(200)
    assert processes[0].exitcode == 9
    aside = folder / "_checkpoint-4.replaced"
    before = bytes_of(aside)
    with pytest.raises(ValueError, match="checkpoint-4 is torn"):
        checkpoint.inspect(folder / "checkpoint-4")
    (folder / "checkpoint-6" / "trainer_state.json").unlink()  # the last whole one is the one that was being replaced
    found = run_ranks(resumed, world_size, folder, True, folder=tmp_path / "again")
    assert not aside.exists() and bytes_of(folder / "checkpoint-4") == before
    assert tiny.differing(whole["weights"], found[0]) == []


# ---- How processes end ----

ENDS = """
import os, sys, types
# The package without what it exports, which would import transformers: seconds, for each of the processes.
sys.modules["hf_sampa"] = types.ModuleType("hf_sampa")
sys.modules["hf_sampa"].__path__ = [{package!r}]
import torch
import torch.distributed as dist
from datetime import timedelta
from hf_sampa.distributed.exchange import Exchange, close_groups
from hf_sampa.distributed.roles import Mesh
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2, init_method={store!r})
exchange = Exchange(Mesh(2, rank, True), timedelta(minutes=30))
exchange.gather(torch.ones(3))
{end}
"""
HOW = {
    "forgotten": ("import atexit, hf_sampa.distributed.exchange as e; atexit.unregister(e._close_forgotten_groups);"
                  "atexit.register(lambda: print('open:', dist.is_initialized())); atexit.register(e._close_forgotten_groups)", 0),
    "closed": ("close_groups(); print('open:', dist.is_initialized())", 0),
    "closed by others": ("dist.destroy_process_group(); print('open:', dist.is_initialized())", 0),
    "an exception": ("raise ValueError('of its own')", 1),
    "the other is gone": (
        "if rank == 1: os._exit(0)\n"
        "exchange.transfer(torch.ones(10), torch.ones(10))\n"
        "print('open: False')", 0),
}  # fmt: skip


@pytest.mark.parametrize("how", divided(HOW, whole=["closed"]))  # which is what is done where it was forgotten
def test_groups_are_closed_at_the_end(tmp_path, how):
    """In time, and with the exit code that the script has."""
    end, code = HOW[how]
    script = ENDS.format(package=str(Path(hf_sampa.__file__).parent), store=f"file://{tmp_path / 'store'}", end=end)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [code, code], outputs
    expected = "of its own" if code else "open: False"
    assert expected in outputs[0][0] + outputs[0][1]
