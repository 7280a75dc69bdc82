"""Runs started as users start them: python, torchrun, accelerate launch; killed and continued."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.ranks import Ran, free_port, run_script, start_script


pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("train_script.py"))


def launch(*command, **kwargs) -> subprocess.Popen:
    """A process group of its own, one thread per process, gloo on the loopback interface."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=env, cwd=ROOT, start_new_session=True, **pipes, **kwargs)


def accelerate(config: str, *arguments) -> subprocess.Popen:
    options = ("--config_file", ROOT / "accelerate_configs" / config, "--main_process_port", free_port())
    return launch(sys.executable, "-m", "accelerate.commands.launch", *options, SCRIPT, *arguments)


def torchrun(*arguments) -> subprocess.Popen:
    return launch(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *arguments
    )


def alone(*arguments) -> subprocess.Popen:
    return launch(sys.executable, SCRIPT, *arguments)


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def weights_of(folder: Path, world_size: int) -> list[dict]:
    """By rank."""
    # Each rank saw the whole world: two processes that train alone would get the same weights, too.
    assert {(folder / f"world{rank}").read_text() for rank in range(world_size)} == {str(world_size)}
    return [load_file(folder / f"weights{rank}.safetensors") for rank in range(world_size)]


@pytest.mark.parametrize(
    ("start", "world_size"),
    [
        pytest.param(alone, 1, marks=pytest.mark.whole),
        pytest.param(torchrun, 2, marks=pytest.mark.whole),
        (partial(accelerate, "cpu_2_processes.yaml"), 2),
    ],
    ids=["python", "torchrun", "accelerate"],
)
def test_every_way_of_starting_gives_the_same_weights(tmp_path, start, world_size):
    (run,) = run_script(SCRIPT, tmp_path / "forked", folder=tmp_path / "ranks")
    assert run.returncode == 0, run.stderr
    finished(start(tmp_path / "started"))
    (expected,) = weights_of(tmp_path / "forked", 1)
    for weights in weights_of(tmp_path / "started", world_size):
        assert tiny.differing(weights, expected) == []


def run_on_two(folder: Path, *arguments) -> list[Ran]:
    return run_script(SCRIPT, folder, *arguments, processes=2, folder=folder.parent / "ranks")


def test_killed_between_two_saves_and_continued(tmp_path):
    """By SIGKILL, without warning; on two processes, continued on two."""
    whole = run_on_two(tmp_path / "whole", "--save_steps", 3)
    arguments = (tmp_path / "killed", "--save_steps", 3, "--slowly")
    killed, _, _store = start_script(SCRIPT, *arguments, processes=2, folder=tmp_path / "ranks of killed")
    state = tmp_path / "killed" / "checkpoint-6" / "trainer_state.json"
    deadline = time.time() + 120
    while not state.exists():
        assert time.time() < deadline and all(process.is_alive() for process in killed)
        time.sleep(0.02)
    for process in killed:
        process.kill()
    for process in killed:
        process.join()
    assert not list((tmp_path / "killed").glob("weights*"))
    continued = run_on_two(tmp_path / "killed", "--save_steps", 3, "--resume")
    assert [run.returncode for run in (*whole, *continued)] == [0] * 4, (whole, continued)
    left_alone, weights = (load_file(tmp_path / name / "weights0.safetensors") for name in ("whole", "killed"))
    assert tiny.differing(left_alone, weights) == []


MESSAGE = "No valid checkpoint found in output directory"


def test_an_exception_ends_every_process(tmp_path):
    for run in run_on_two(tmp_path / "out", "--resume"):
        assert run.returncode == 1 and MESSAGE in run.stderr


@pytest.mark.whole
def test_an_exception_ends_the_launch(tmp_path):
    process = accelerate("cpu_2_processes.yaml", tmp_path, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert MESSAGE in output
