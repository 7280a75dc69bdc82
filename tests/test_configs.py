"""The files beside the code: launch configurations, pinned versions, make targets."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import prepare_multi_gpu_env
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_sampa import launch
from hf_sampa.distributed import units
from tests import sharded, tiny
from tests.project import PYPROJECT, ROOT
from tests.ranks import run_ranks


CONFIGS = {
    "cpu_2_processes": 2,
    "cpu_4_processes": 4,
    "fsdp2_4": 4,
    "fsdp2_8": 8,
    "gpu_2": 2,
    "gpu_4": 4,
    "gpu_8": 8,
    "one_process": 1,
}
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


def environment_of(monkeypatch, *options: str) -> dict[str, str]:
    """What `launch` tells processes of FSDP."""
    asked = []
    monkeypatch.setattr(launch, "devices", lambda: 8)
    monkeypatch.setattr(launch.accelerate_launch, "multi_gpu_launcher", asked.append)
    launch.launch([*options, "script.py"])
    told = prepare_multi_gpu_env(*asked).items() - os.environ.items()
    return {key: value for key, value in told if "FSDP" in key}


def train_on_shards(folder, environment) -> tuple[int, list[str]]:
    os.environ.update(environment)
    args = tiny.arguments(folder, max_steps=2)
    trainer = sharded.OnCPU(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    trainer.train()
    wrapped = [type(module).__name__ for module in units(trainer.model)]
    return trainer.sampa.weights.count, wrapped


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp2_4", pytest.param("fsdp2_8", marks=pytest.mark.whole)])
def test_a_configuration_of_shards_makes_two_roles_of_them(name, tmp_path, monkeypatch):
    # accelerate 1.15 cannot shard a BERT's embeddings as a layer, and as embeddings once more.
    layers = ("--fsdp_transformer_layer_cls_to_wrap", "BertLayer")
    environment = environment_of(monkeypatch, "--config", name, *layers)
    for count, wrapped in run_ranks(train_on_shards, CONFIGS[name], tmp_path, environment, folder=tmp_path / "ranks"):
        assert count == CONFIGS[name] // 2
        assert {"FSDPBertForSequenceClassification", "FSDPBertLayer"} <= set(wrapped)


@pytest.mark.parametrize("name", ["fsdp2_4", "fsdp2_8"])
def test_a_configuration_of_shards_is_what_the_arguments_of_a_plan_are(name, tmp_path, monkeypatch):
    args = tiny.arguments(tmp_path, fsdp=True, fsdp_config={"version": 2})
    by_arguments = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    for key in [key for key in os.environ if "FSDP" in key]:
        monkeypatch.delenv(key)
    for key, value in environment_of(monkeypatch, "--config", name).items():
        monkeypatch.setenv(key, value)
    # As text, because policies are made anew.
    assert repr(FullyShardedDataParallelPlugin()) == repr(by_arguments)
    assert by_arguments.fsdp_version == 2


@pytest.mark.parametrize("name", ["gpu_2", "gpu_4"])
def test_a_configuration_without_shards_says_nothing_of_them(name, monkeypatch):
    assert environment_of(monkeypatch, "--config", name) == {}


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
