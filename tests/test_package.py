"""What is installed: the wheel and the sdist as a package index would have them, in an environment that has nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hf_sampa
from hf_sampa import launch
from tests.project import PYPROJECT, ROOT


CONFIGS = sorted(path.name for path in (ROOT / "accelerate_configs").iterdir())
NAME = f"hf_sampa-{hf_sampa.__version__}"
# What README's first lines of code need around them: a small model and data.
AROUND = """
import torch
from transformers import BertConfig, BertForSequenceClassification

torch.manual_seed(0)
config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
model = BertForSequenceClassification(config)
train_dataset = [{"input_ids": [i % 32, 3, 5], "labels": i % 2} for i in range(32)]
"""


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """Wheel and sdist, built by what pyproject.toml names, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="session")
def installed(dist, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel and what it asks for, in the pinned versions."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", dist / f"{NAME}-py3-none-any.whl")
    return python


def run(*command, cwd: Path | None = None) -> str:
    # Whatever else the Python that runs the tests finds.
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def metadata(dist) -> Message:
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        return message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))


@pytest.mark.whole
def test_a_package_index_would_take_it(dist):
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


@pytest.mark.whole
def test_what_the_package_reads_is_in_the_wheel(dist):
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    tracked = run("git", "ls-files", "hf_sampa", cwd=ROOT).split()
    assert {name for name in names if name.startswith("hf_sampa/")} == {
        *tracked,
        *(f"hf_sampa/accelerate_configs/{name}" for name in CONFIGS),
    }


@pytest.mark.whole
def test_the_page_on_the_index_links_to_places_that_are_there(metadata):
    """No link, and no picture, by a path; each leads to a file of the project at the version's tag. No formula, either."""
    page = metadata.get_payload()
    links = re.findall(r"\]\((?!#)([^)]+)\)", page)
    assert len(links) > 15 and all(link.startswith("https://") for link in links)
    ours = [
        re.fullmatch(
            r"https://(?:github|raw\.githubusercontent)\.com/hf-sampa/hf_sampa/(?:blob/)?v([^/]+)/(.+?)(?:#.*)?", each
        )
        for each in links
    ]
    found = [match.groups() for match in ours if match]
    assert len(found) > 12
    for version, path in found:
        assert version == hf_sampa.__version__ and (ROOT / path).is_file(), path
    assert "$" not in page and "```math" not in page


@pytest.mark.whole
def test_the_index_shows_what_one_asks_of_a_package(metadata):
    assert metadata["Version"] == hf_sampa.__version__
    assert {line.split(",")[0] for line in metadata.get_all("Project-URL")} == set(PYPROJECT["project"]["urls"])
    assert metadata["Requires-Python"] == PYPROJECT["project"]["requires-python"]


@pytest.mark.whole
def test_the_tests_run_from_the_sdist(dist, tmp_path):
    """Those of the scripts, which are no part of the wheel, and those that read files beside the code."""
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        sdist.extractall(tmp_path, filter="data")
    files = (
        "tests/test_glue_script.py",
        "tests/test_configs.py",
        "tests/test_functional.py",
        "tests/test_citations.py",
    )
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=tmp_path / NAME)
    assert re.search(r"\d{2,} passed", said)


@pytest.mark.whole
def test_the_wheel_works_where_there_is_nothing_else(installed, tmp_path):
    """Import, catalogue, configurations."""
    where = run(installed, "-c", "import hf_sampa; print(hf_sampa.__version__, hf_sampa.__file__)", cwd=tmp_path)
    version, file = where.split()
    assert version == hf_sampa.__version__ and Path(file).is_relative_to(installed.parents[1])
    assert "esam" in run(installed, "-m", "hf_sampa.variants", cwd=tmp_path)
    config = run(installed, "-m", "hf_sampa", "config", "gpu_2", cwd=tmp_path).strip()
    assert Path(config).read_text() == (ROOT / "accelerate_configs" / "gpu_2.yaml").read_text()


@pytest.mark.whole
@pytest.mark.distributed
def test_the_first_lines_of_the_readme_run_on_one_process_and_on_two(installed, tmp_path):
    """With the same weights, bit for bit."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    lines = [line[2:] for line in diff.splitlines() if not line.startswith("-")]
    script = tmp_path / "script.py"
    script.write_text("\n".join([AROUND, *lines, "trainer.save_model()"]))
    weights = []
    for started in (
        ["-m", "hf_sampa", "launch", "--config", "one_process"],
        ["-m", "hf_sampa", "launch", "--config", "cpu_2_processes"],
    ):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        run(installed, *started, script, cwd=folder)
        weights.append(load_file(folder / "out" / "model.safetensors"))
    one, two = weights
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(("devices", "name"), [(0, "cpu_2_processes"), (1, "one_process"), (2, "gpu_2"), (8, "gpu_2")])
def test_the_pair_of_this_machine(devices, name, monkeypatch):
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: devices > 0)
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: devices)
    assert launch.for_this_machine() == name


def launched(monkeypatch, *argv: str):
    """What accelerate is asked to do."""
    asked = []
    monkeypatch.setattr(launch.accelerate_launch, "launch_command", asked.append)
    launch.launch(list(argv))
    (args,) = asked
    return args


def test_launch_takes_what_accelerate_takes(monkeypatch, capsys):
    monkeypatch.setattr(launch, "devices", lambda: 2)
    args = launched(monkeypatch, "--num_machines", "2", "--config", "gpu_4", "script.py", "--config", "of the script")
    assert (args.num_machines, args.training_script) == (2, "script.py")
    assert args.training_script_args == ["--config", "of the script"]
    assert Path(args.config_file) == ROOT / "accelerate_configs" / "gpu_4.yaml"
    assert capsys.readouterr().err == f"accelerate launch --config_file {args.config_file}\n"


def test_launch_leaves_a_configuration_of_ones_own(monkeypatch):
    assert launched(monkeypatch, "--config_file", "mine.yaml", "script.py").config_file == "mine.yaml"


def test_launch_refuses_two_configurations(monkeypatch):
    with pytest.raises(SystemExit) as error:
        launched(monkeypatch, "--config_file", "mine.yaml", "--config", "gpu_2", "script.py")
    assert str(error.value) == (
        "--config: expected either a configuration of this package or one of your own (--config_file), got both."
    )


def test_launch_refuses_what_would_start_one_process(monkeypatch):
    with pytest.raises(SystemExit) as error:
        launched(monkeypatch, "--cpu", "--config", "cpu_2_processes", "script.py")
    assert str(error.value) == (
        "--cpu: accelerate starts a single process with it. Leave it out, and take --config cpu_2_processes for a pair on the CPU, "
        "or --config one_process."
    )
    assert launched(monkeypatch, "--cpu", "--config", "one_process", "script.py").cpu


@pytest.mark.parametrize(
    ("options", "devices", "said"),
    [
        (
            "gpu_2",
            0,
            "each of 2 processes on this machine, got 0. Take --config cpu_2_processes, which trains on the CPU.",
        ),
        (
            "gpu_4",
            0,
            "each of 4 processes on this machine, got 0. Take --config cpu_4_processes, which trains on the CPU.",
        ),
        (
            "fsdp2_8",
            0,
            "each of 8 processes on this machine, got 0. Take --config cpu_2_processes, which trains on the CPU.",
        ),
        ("gpu_2", 1, "each of 2 processes on this machine, got 1. Take --config one_process."),
        ("gpu_8", 4, "each of 8 processes on this machine, got 4. Take --config gpu_4."),
        ("fsdp2_8", 6, "each of 8 processes on this machine, got 6. Take --config gpu_2."),
        ("gpu_2 --num_processes 6", 4, "each of 6 processes on this machine, got 4. Take --config gpu_4."),
        ("gpu_8 --num_machines 2", 2, "each of 4 processes on this machine, got 2. Take --config gpu_2."),
    ],
)
def test_launch_refuses_more_processes_than_devices(monkeypatch, options, devices, said):
    monkeypatch.setattr(launch, "devices", lambda: devices)
    with pytest.raises(SystemExit) as error:
        launched(monkeypatch, "--config", *options.split(), "script.py")
    name = options.split()[0]
    assert str(error.value) == f"--config {name}: expected a GPU, or a device like it, for {said}"


@pytest.mark.parametrize(
    ("options", "devices"),
    [("cpu_4_processes", 0), ("one_process", 0), ("gpu_4", 4), ("gpu_4", 8), ("gpu_8 --num_machines 2", 4)],
)
def test_launch_starts_what_there_are_devices_for(monkeypatch, options, devices):
    monkeypatch.setattr(launch, "devices", lambda: devices)
    assert launched(monkeypatch, "--config", *options.split(), "script.py").training_script == "script.py"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "end", "code"),
    [("one_process", "sys.exit(3)", 3), ("cpu_2_processes", "os.kill(os.getpid(), 9)", 137)],
)
def test_launch_ends_as_its_script_has_ended(config, end, code, tmp_path):
    """With its exit code, and without a traceback of the launcher."""
    script = tmp_path / "a script.py"
    script.write_text(f"import os, sys\n{end}\n")
    command = [sys.executable, "-m", "hf_sampa", "launch", "--config", config, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_the_command_line_says_what_there_is(capsys):
    from hf_sampa.__main__ import main

    main([])
    usage = capsys.readouterr().out
    assert "launch" in usage and "config" in usage
    main(["config"])
    listed = capsys.readouterr().out
    assert all(Path(name).stem in listed for name in CONFIGS)
    for wrong, said in (
        (["lunch"], "expected launch, config or plan, got 'lunch'."),
        (["config", "gpu_3"], "got gpu_3."),
    ):
        with pytest.raises(SystemExit, match=re.escape(said)):
            main(wrong)
