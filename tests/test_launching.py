"""What `docs/launching.md` starts on several machines: taken by what reads it, and tried with two launchers on this one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser as torchrun_parser

from hf_sampa.distributed import Mesh
from tests.project import ROOT
from tests.ranks import free_port


PAGE = ROOT / "docs" / "launching.md"
NODES, ON_A_NODE = 2, 8


def blocks(kind: str) -> list[str]:
    tokens = MarkdownIt().parse(PAGE.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == kind]


def slurm_script() -> str:
    (script,) = blocks("shell")
    return script


def kubernetes_objects() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all(*blocks("yaml"))
    return service, job


def torchrun_of_job(index: int) -> list[str]:
    """Its command, as the kubelet fills it in."""
    _, job = kubernetes_objects()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["command"] + container["args"]]


# ---- What is read ----


def test_bash_reads_the_slurm_script(tmp_path):
    script = tmp_path / "sampa.sbatch"
    script.write_text(slurm_script())
    subprocess.run(["bash", "-n", script], check=True)
    assert slurm_script().startswith("#!/bin/bash\n#SBATCH ")
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", slurm_script(), re.MULTILINE))
    assert asked["nodes"] == str(NODES) and asked["ntasks-per-node"] == "1"
    srun = next(line for line in slurm_script().replace("\\\n", "").splitlines() if line.startswith("srun "))
    _, _, words = srun.partition(" torchrun ")
    started = torchrun_parser().parse_args(shlex.split(words))
    assert (started.nnodes, started.nproc_per_node) == ("$SLURM_NNODES", asked["gpus-per-node"])
    assert started.rdzv_endpoint == "$first:29500" and started.training_script == "script.py"


def test_kubernetes_finds_the_first_pod():
    """By the name that a headless service gives to the pod of index 0, which is that of the Job."""
    service, job = kubernetes_objects()
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}  # a label that the Job gives to its pods
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == NODES
    (container,) = pod["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    program, *words = torchrun_of_job(1)
    started = torchrun_parser().parse_args(words)
    assert program == "torchrun" and started.master_addr == f"{name}-0.{service['metadata']['name']}"
    assert (started.nnodes, started.node_rank) == (str(NODES), 1)
    assert started.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"]) == str(ON_A_NODE)


def test_pairs_are_where_the_page_says():
    """Of 2k processes on two machines each pair is on both, and each role on one."""
    for rank in range(NODES * ON_A_NODE):
        mesh = Mesh(NODES * ON_A_NODE, rank, paired=True)
        assert mesh.peer // ON_A_NODE != rank // ON_A_NODE
        assert {each // ON_A_NODE for each in mesh.ranks_of(mesh.roles[0])} == {rank // ON_A_NODE}


# ---- Two launchers on one machine ----


SHOWS_ITS_PLACE = """
import os, pathlib
place = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")]
pathlib.Path(__file__).with_name(" ".join(place) + ".place").touch()
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a script that shows where it is, in which to start it."""
    (tmp_path / "script.py").write_text(SHOWS_ITS_PLACE)
    programs = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", programs)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_four_processes_on_two_nodes(place: Path) -> None:
    found = sorted(path.stem for path in place.glob("*.place"))
    assert found == [f"{rank} 4 {rank % 2} {rank // 2}" for rank in range(4)]


def smaller(command: str) -> str:
    """With two processes on each node, on a port that is free."""
    return command.replace(f"nproc_per_node {ON_A_NODE}", "nproc_per_node 2").replace("29500", str(free_port()))


def on_both_nodes(commands: list[str]) -> None:
    started = [subprocess.Popen(["bash", "-c", command]) for command in commands]
    assert [each.wait(timeout=120) for each in started] == [0, 0]


@pytest.mark.whole
@pytest.mark.distributed
def test_two_machines(place):
    (command,) = [block for block in blocks("bash") if "--nnodes 2" in block]
    on_both_nodes([smaller(command.replace("HOST", "localhost"))] * 2)
    assert_four_processes_on_two_nodes(place)


@pytest.mark.whole
@pytest.mark.distributed
def test_the_slurm_script(place, monkeypatch):
    """With programs that do what SLURM's do, for two nodes that are both this machine."""
    (place / "scontrol").write_text("#!/bin/bash\necho localhost\necho localhost\n")
    (place / "srun").write_text('#!/bin/bash\nshift\n"$@" &\n"$@" &\nwait -n && wait -n\n')
    for name in ("scontrol", "srun"):
        (place / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost,localhost")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    subprocess.run(["bash", "-c", smaller(slurm_script())], check=True, timeout=120)
    assert_four_processes_on_two_nodes(place)


@pytest.mark.whole
@pytest.mark.distributed
def test_the_job_of_kubernetes(place):
    port = free_port()
    commands = [shlex.join(torchrun_of_job(index)).replace(f"={ON_A_NODE}", "=2") for index in range(NODES)]
    on_both_nodes([each.replace("sampa-0.sampa", "localhost").replace("29500", str(port)) for each in commands])
    assert_four_processes_on_two_nodes(place)
