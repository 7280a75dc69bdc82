"""One process raises, dies, stops or hangs, wherever the run is: the others end within the timeout, and say what to do."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from hf_sampa.distributed import launcher
from tests import tiny
from tests.ranks import start_ranks


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed

TIMEOUT = 6.0  # of the world, in seconds
SPARE = 4.0  # for ending, on a machine that is busy
WORDS = (
    "expected an answer from the other 1 process(es) of this run and got none",
    "A checkpoint was given up, because another process failed to write",
)
WAY_OUT = "Start the run again with resume_from_checkpoint=True."


def rank() -> int:
    return int(os.environ["RANK"])


class Fault:
    """What goes wrong, once, on one rank, at one place; says when, in a file."""

    def __init__(self, folder, place: str, on: int, kind: str):
        self.place, self.kind, self.said = place, kind, Path(folder) / "fault"
        self.here = rank() == on  # within a pass it is another one's

    def at(self, place: str) -> None:
        """The run has come to `place`."""
        if self.here and place == "callback" and self.place == "any moment":
            self.here = False
            threading.Timer(float(self.kind), self._now, ["is stopped"]).start()
        if self.here and place == self.place:
            self.here = False
            self._now(self.kind)

    def _now(self, kind: str) -> None:
        self.said.write_text(str(time.time()))
        KINDS[kind]()


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
    """Comes by every place at which one process waits for another; see `METHODS`."""

    fault: Fault

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 3:
            self.fault.at("pass")
        return super().compute_loss(*args, **kwargs)


METHODS = {
    "log": "log",
    "evaluation_loop": "evaluation",
    "prediction_step": "evaluated batch",
    "_save_checkpoint": "save",
    "_save_optimizer_and_scheduler": "saving the optimizer",
    "_save_rng_state": "saving random states",
    "_load_best_model": "loading the best model",
    "get_train_dataloader": "loader",
}


def coming_by(place: str, method: str):
    """A `method` that first comes to a place."""

    def override(self, *args, **kwargs):
        self.fault.at(place)
        return getattr(super(Faulty, self), method)(*args, **kwargs)

    return override


for method, place in METHODS.items():
    setattr(Faulty, method, coming_by(place, method))


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
ENDLESS = {"max_steps": 1_000_000, "ddp_timeout": TIMEOUT, "logging_strategy": "no"}


def train(folder, place, on, kind):
    os.dup2(os.open(Path(folder) / f"log{rank()}", os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a forked process has it ignored
    fault = Fault(folder, place, on, kind)
    fault.at("start")
    args = tiny.arguments(folder, **(SETTINGS if place != "any moment" else ENDLESS))
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


@dataclass
class World:
    """Two processes, one of which comes to its fault."""

    place: str
    on: int
    kind: str
    folder: Path

    def __post_init__(self):
        case = (self.place, self.on, self.kind)
        self.processes, self.results, self.store = start_ranks(train, 2, self.folder, *case, folder=self.folder)

    def problem(self) -> str | None:
        """How the other process ended, where that is not in time and with our words."""
        try:
            other, seconds = self.processes[1 - self.on], self._seconds()
            if other.is_alive():
                os.kill(other.pid, signal.SIGUSR1)  # writes where it is into its log
                time.sleep(1)
            said = self._said(1 - self.on)
            if (
                other.is_alive()
                or seconds > TIMEOUT + SPARE
                or not (WAY_OUT in said and any(each in said for each in WORDS))
            ):
                end = said.strip().splitlines()[-1:] or (self.folder / f"log{1 - self.on}").read_text()[-2000:]
                return (
                    f"{self.place} {self.kind} on {self.on}: {seconds:.1f} s, alive: {other.is_alive()}, said: {end}"
                )
            return None
        finally:
            for process in self.processes:
                process.kill()
                process.join()

    def _seconds(self) -> float:
        """From the fault to the end of the other process, or as long as it is waited for."""
        fault, begun = self.folder / "fault", time.time()
        while not (fault.exists() and fault.read_text()) and time.time() - begun < 60:
            time.sleep(0.02)
        since = float(fault.read_text())
        self.processes[1 - self.on].join(max(0.0, since + 40 - time.time()))
        return time.time() - since

    def _said(self, of: int) -> str:
        error = self.results[of].with_suffix(".err")
        return error.read_text() if error.exists() else ""


AT_ONCE = 3  # worlds: most of the time they wait


def check(cases, folder, figure):
    """The other process of every world ends well."""
    problems = []
    for begin in range(0, len(cases), AT_ONCE):
        worlds = [World(*case, folder / f"{begin}-{i}") for i, case in enumerate(cases[begin : begin + AT_ONCE])]
        problems += filter(None, [world.problem() for world in worlds])
    figure("peers that failed", len(cases), len(cases) - len(problems))
    assert problems == []


SHORT = [("evaluation", 1, "is stopped"), ("saving the optimizer", 0, "raises"), ("callback", 0, "is stopped")]


def test_the_other_process_ends_in_time_and_says_why(tmp_path, figure):
    check(SHORT, tmp_path, figure)


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["raises", "is killed", "is stopped"])
def test_wherever_it_is(tmp_path, kind, figure):
    check([(place, on, kind) for place in PLACES for on in (0, 1)], tmp_path, figure)


@pytest.mark.whole
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("raises", "is killed", "is stopped")])
def test_whatever_it_is(tmp_path, kind, figure):
    check(
        [(place, on, kind) for place in ("data", "pass", "evaluated batch", "save") for on in (0, 1)], tmp_path, figure
    )


@pytest.mark.whole
def test_stopped_at_any_moment(tmp_path, figure):
    """Signals that arrive anywhere in a step, of a process that has begun to send or has not."""
    rng = random.Random(1)
    cases = [("any moment", rng.randrange(2), f"{rng.uniform(0, 0.3)}") for _ in range(30)]
    check(cases, tmp_path, figure)


# ---- A launcher that is killed ----


def test_a_process_whose_launcher_is_gone_gets_a_sigterm(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(launcher, "SECONDS", 0.01)
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        launcher.end_with_launcher()
        threads = threading.active_count()
        launcher.end_with_launcher()
        assert threading.active_count() == threads
        assert not received.wait(0.1)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert received.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_without_a_launcher_may_outlive_their_parent():
    threads = threading.active_count()
    launcher.end_with_launcher()
    assert threading.active_count() == threads


@pytest.mark.whole
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_processes_end_with_their_launcher(tmp_path, name, figure):
    started = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": [
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml"),
        ],
    }[name]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", *started, str(Path(__file__).with_name("endless_script.py")), str(tmp_path)],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=tmp_path,
        )
    steps = [tmp_path / f"step{rank}" for rank in range(2)]
    until = time.time() + 120
    while not all(each.exists() and each.read_text() for each in steps):
        assert running.poll() is None and time.time() < until, (tmp_path / "log").read_text()
        time.sleep(0.05)
    workers = [int(each.read_text()) for each in steps]
    running.kill()
    running.wait()
    until = time.time() + TIMEOUT
    while (left := [worker for worker in workers if is_running(worker)]) and time.time() < until:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []
    assert (tmp_path / "log").read_text().count("The launcher of this process") >= 1
    figure("launchers that were killed", 1, 1)


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
