"""``python -m hf_sampa launch script.py``: `accelerate launch` with one of the configurations that come with the package.

A launch configuration says how many processes there are; two of them are a SAMPa pair. They are the files of ``accelerate_configs/``,
which the wheel carries along.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from subprocess import CalledProcessError

import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import ClusterConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


# In an installed package they are in it, in a clone beside it.
FOLDERS = [Path(__file__).with_name("accelerate_configs"), Path(__file__).parents[1] / "accelerate_configs"]


def configurations() -> dict[str, Path]:
    """The launch configurations that come with the package, by name."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def devices() -> int:
    """How many GPUs, or devices like them, this machine has."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def for_this_machine() -> str:
    """The name of the configuration of one pair: on two devices, or without any on the CPU; one process on a single device."""
    return {0: "cpu_2_processes", 1: "one_process"}.get(devices(), "gpu_2")


def described() -> str:
    """A line on each configuration, from the comment at its top."""
    width = max(map(len, configurations()))
    return "\n".join(
        f"  {name:{width}}  {file.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}"
        for name, file in configurations().items()
    )


def parser() -> argparse.ArgumentParser:
    """That of ``accelerate launch``, with one option more."""
    made = accelerate_launch.launch_command_parser()
    made.prog = "python -m hf_sampa launch"
    made.usage = "%(prog)s [options] script.py [options of the script]"
    made.description = (
        "Start a script as a SAMPa pair: accelerate launch, with a configuration that comes with this package."
    )
    made.epilog = f"configurations (--config):\n{described()}"
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument(
        "--config",
        choices=list(configurations()),
        help=f"a launch configuration of this package; without it and --config_file the pair of this machine, {for_this_machine()}",
    )
    return made


def launch(argv: list[str]) -> None:
    """Do what ``accelerate launch`` does with `argv`, in a configuration of ours unless it has a ``--config_file``.

    Raises:
        SystemExit: the configuration is not for this machine; or a process failed, with its exit code. What went wrong it has said itself;
            the launcher's report of some 30 lines would stand below that.
    """
    args = parser().parse_args(argv)
    if args.config and args.config_file:
        sys.exit(
            "--config: expected either a configuration of this package or one of your own (--config_file), got both."
        )
    chosen = args.config or for_this_machine()
    if args.cpu and not args.config_file and chosen != "one_process":
        sys.exit(
            "--cpu: accelerate starts a single process with it. Leave it out, and take --config cpu_2_processes for a pair on the CPU, "
            "or --config one_process."
        )
    if not args.config_file:
        _check_devices(chosen, args)
    args.config_file = args.config_file or str(configurations()[chosen])
    del args.config
    print(f"accelerate launch --config_file {shlex.quote(args.config_file)}", file=sys.stderr, flush=True)
    try:
        accelerate_launch.launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"Rank {rank} ended first, with exit code {failure.exitcode}. What it said stands above.", file=sys.stderr
        )
        sys.exit(_as_of_a_shell(failure.exitcode))
    except CalledProcessError as error:  # of a world of one
        sys.exit(_as_of_a_shell(error.returncode))
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _check_devices(name: str, args: argparse.Namespace) -> None:
    """Exit where processes would have no device each: without any they would train on the CPU, with too few they fail when all have started."""
    config = ClusterConfig.from_yaml_file(configurations()[name])
    processes = (args.num_processes or config.num_processes) // (args.num_machines or 1)
    there = devices()
    if config.use_cpu or config.num_processes == 1 or processes <= there:
        return
    alike = f"{name.rpartition('_')[0]}_{there}" if there else f"cpu_{processes}_processes"
    sys.exit(
        f"--config {name}: expected a GPU, or a device like it, for each of {processes} processes on this machine, got {there}. Take "
        f"--config {alike if alike in configurations() else for_this_machine()}{'' if there else ', which trains on the CPU'}."
    )


def _as_of_a_shell(exit_code: int) -> int:
    """A process that signal n has ended has exit code -n here, and 128 + n for shells and schedulers."""
    return exit_code if exit_code >= 0 else 128 - exit_code
