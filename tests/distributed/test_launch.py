"""Runs started as users start them: python, torchrun, accelerate launch; killed and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.ranks import free_port


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


def test_every_way_of_starting_gives_the_same_weights(tmp_path):
    starts = {
        "alone": (alone, 1),
        "torchrun": (torchrun, 2),
        "accelerate": (lambda *arguments: accelerate("cpu_2_processes.yaml", *arguments), 2),
    }
    found = {}
    for name, (start, world_size) in starts.items():
        finished(start(tmp_path / name))
        # each rank saw the whole world: two processes that train alone would get the same weights too
        assert {(tmp_path / name / f"world{rank}").read_text() for rank in range(world_size)} == {str(world_size)}
        for rank in range(world_size):
            found[name, rank] = load_file(tmp_path / name / f"weights{rank}.safetensors")
    for weights in found.values():
        assert tiny.differing(weights, found["alone", 0]) == []


def test_killed_between_two_saves_and_continued(tmp_path):
    """By SIGKILL, without warning; on two processes, continued on two."""
    finished(accelerate("cpu_2_processes.yaml", tmp_path / "whole", "--save_steps", 3))
    killed = accelerate("cpu_2_processes.yaml", tmp_path / "killed", "--save_steps", 3, "--slowly")
    state = tmp_path / "killed" / "checkpoint-6" / "trainer_state.json"
    deadline = time.time() + 120
    while not state.exists():
        assert time.time() < deadline and killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed").glob("weights*"))
    finished(accelerate("cpu_2_processes.yaml", tmp_path / "killed", "--save_steps", 3, "--resume"))
    left_alone, continued = (load_file(tmp_path / name / "weights0.safetensors") for name in ("whole", "killed"))
    assert tiny.differing(left_alone, continued) == []


def test_an_exception_in_one_process_ends_the_launch(tmp_path):
    process = accelerate("cpu_2_processes.yaml", tmp_path, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "No valid checkpoint found in output directory" in output
