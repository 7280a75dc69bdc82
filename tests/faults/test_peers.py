"""One process raises, dies, stops or hangs, wherever the run is: the others end within the timeout, and say what to do."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from tests import tiny
from tests.division import divided
from tests.ranks import start_ranks


pytestmark = pytest.mark.distributed

TIMEOUT = 6.0  # of the world, in seconds
OTHERS = "expected an answer from the other 1 process(es) of this run and got none"
WAY_OUT = "Start the run again with resume_from_checkpoint=True."


def rank() -> int:
    return int(os.environ["RANK"])


class Fault:
    """What goes wrong, once, on one rank, at one place; says when, in a file."""

    def __init__(self, folder, place: str, on: int, kind: str):
        self.place, self.kind, self.said = place, kind, Path(folder) / "fault"
        self.here = rank() == on  # within a pass it is another one's

    def at(self, place: str) -> None:
        if place != self.place or not self.here:
            return
        self.here = False
        self.said.write_text(str(time.time()))
        KINDS[self.kind]()


def raises(error):
    def act():
        raise error

    return act


def hangs():
    time.sleep(1000)


KINDS = {
    "raises": raises(ValueError("this rank failed")),
    "out of memory": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "no memory": lambda: torch.empty(1 << 50),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "is interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
    "is ended": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hangs": hangs,
}


class Events(TrainerCallback):
    def __init__(self, fault: Fault):
        self.fault = fault

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.fault.at("callback")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.fault.at("update")

    def on_log(self, args, state, control, **kwargs):
        self.fault.at("after a log")


class Faulty(SAMPaTrainer):
    """Comes by every place at which one process waits for another."""

    fault: Fault

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 3:
            self.fault.at("pass")
        return super().compute_loss(*args, **kwargs)

    def log(self, *args, **kwargs):
        self.fault.at("log")
        return super().log(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        self.fault.at("evaluation")
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        self.fault.at("evaluated batch")
        return super().prediction_step(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.fault.at("save")
        return super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, *args, **kwargs):
        self.fault.at("saving the optimizer")
        return super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _save_rng_state(self, *args, **kwargs):
        self.fault.at("saving random states")
        return super()._save_rng_state(*args, **kwargs)

    def _load_best_model(self):
        self.fault.at("loading the best model")
        return super()._load_best_model()

    def get_train_dataloader(self):
        self.fault.at("loader")
        return super().get_train_dataloader()


class Data(torch.utils.data.Dataset):
    """Sentences, of which the 10th comes to the fault."""

    def __init__(self, fault: Fault):
        self.items, self.fault, self.read = tiny.sentences(16), fault, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        self.read += 1
        if self.read == 10:
            self.fault.at("data")
        return self.items[index]


SETTINGS = {
    "max_steps": 6,
    "ddp_timeout": TIMEOUT,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "load_best_model_at_end": True,
    "logging_steps": 1,
}


def train(folder, place, on, kind):
    os.dup2(os.open(Path(folder) / f"log{rank()}", os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    fault = Fault(folder, place, on, kind)
    fault.at("start")
    args = tiny.arguments(folder, **SETTINGS)
    fault.at("constructor")
    trainer = Faulty(
        model=tiny.bert(0.1),
        args=args,
        train_dataset=Data(fault),
        eval_dataset=tiny.sentences(8, seed=3),
        callbacks=[Events(fault)],
    )
    trainer.fault = fault
    trainer.train()
    fault.at("after training")
    trainer.evaluate()
    trainer.predict(tiny.sentences(8, seed=3))


PLACES = (
    *("start", "constructor", "loader", "data", "pass", "callback", "update", "log", "after a log", "evaluation"),
    *("evaluated batch", "save", "saving the optimizer", "saving random states", "loading the best model"),
    "after training",
)


def check(folder, place, on, kind):
    """What is wrong with how the other process ended; None where nothing is."""
    processes, results, _store = start_ranks(train, 2, folder, place, on, kind, folder=folder)
    return processes, results, _store, folder, place, on, kind


def ended(world):
    processes, results, _store, folder, place, on, kind = world
    survivor = processes[1 - on]
    fault = folder / "fault"
    begun = time.time()
    while not (fault.exists() and fault.read_text()) and time.time() - begun < 60:
        time.sleep(0.05)
    since = float(fault.read_text())
    survivor.join(max(0.1, since + 40 - time.time()))
    seconds = time.time() - since
    hung = survivor.is_alive()
    if hung:
        os.kill(survivor.pid, signal.SIGUSR1)
        time.sleep(0.5)
    for process in processes:
        process.kill()
        process.join()
    err = results[1 - on].with_suffix(".err")
    text = err.read_text() if err.exists() else ""
    return seconds, hung, text, survivor.exitcode
