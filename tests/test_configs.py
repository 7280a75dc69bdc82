"""The files beside the code: launch configurations, pinned versions, make targets."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.project import PYPROJECT, ROOT


CONFIGS = {"cpu_2_processes": 2, "cpu_4_processes": 4, "gpu_2": 2, "gpu_4": 4, "one_process": 1}
PROJECT = PYPROJECT["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def config_path(name: str) -> Path:
    return ROOT / "accelerate_configs" / f"{name}.yaml"


def test_every_config_is_listed_here():
    assert {path.stem for path in (ROOT / "accelerate_configs").iterdir()} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_one_that_accelerate_knows(name):
    config = ClusterConfig.from_yaml_file(config_path(name))  # refuses unknown keys
    assert config.num_processes == CONFIGS[name]
    assert config.use_cpu == name.startswith("cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_when_to_use_it(name):
    first, second = config_path(name).read_text().splitlines()[:2]
    assert first.startswith("# ") and second.startswith("# ")


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cpu_2_processes", "cpu_4_processes", "one_process"])
def test_launch_starts_as_many_processes_as_the_config_says(name, tmp_path):
    script = tmp_path / "show_world.py"
    # A file each: what several processes print at once may be torn.
    script.write_text(
        "import os, pathlib\n"
        "world = os.environ.get('RANK', '0') + ' of ' + os.environ.get('WORLD_SIZE', '1')\n"
        "pathlib.Path(__file__).with_name(world).touch()\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_path(name), script]
    subprocess.run(launch, check=True, timeout=120)
    world = CONFIGS[name]
    assert sorted(path.name for path in tmp_path.glob("* of *")) == [f"{rank} of {world}" for rank in range(world)]


def direct_requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    # Pins are those of one Python: what another needs in their place is not among them.
    here = [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate()]
    return [requirement for requirement in here if requirement.name != PROJECT["name"]]


def test_every_direct_dependency_is_pinned_within_its_bounds():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in direct_requirements():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_every_dependency_of_a_dependency_is_pinned():
    pins = {canonicalize_name(name) for name in PINS}
    waiting = [(requirement.name, frozenset(requirement.extras)) for requirement in direct_requirements()]
    seen = set()
    while waiting:
        name, extras = item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        assert canonicalize_name(name) in pins, f"{name} is not in constraints.txt"
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # optional here, as on another platform
        for requirement in map(Requirement, lines):
            markers = [{"extra": extra} for extra in extras or {""}]
            # torch pins the CUDA packages that its own build needs.
            from_cuda = requirement.name.startswith(("nvidia", "cuda", "triton"))
            if not from_cuda and (
                requirement.marker is None or any(requirement.marker.evaluate(marker) for marker in markers)
            ):
                waiting.append((requirement.name, frozenset(requirement.extras)))


def test_constraints_hold_names_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line), line


def test_help_names_the_two_commands_of_the_readme():
    output = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(r"^ +demo +\S", output, re.MULTILINE) and re.search(r"^ +test +\S", output, re.MULTILINE)
