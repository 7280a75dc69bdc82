"""Tests in copies of the project, each run in a process that is forked from one that has imported what takes long.

mutmut and cosmic-ray do not fit: they start Python anew for each change, or change modules within the process that imported
them, while here an import takes longer than most tests, and tests fork servers that import the package for themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest


LEFT_OUT = (".*", "out", "__pycache__", "_build", "*.egg-info")
SLOW_IMPORTS = ("accelerate", "datasets", "torch", "torch.distributed", "transformers", "transformers.trainer")
SLOW_IMPORTS += ("transformers.models.bert.modeling_bert", "transformers.models.vit.modeling_vit")
HANG = 124  # the exit status of a run that was ended for its time


class Copy:
    """A copy of a project in which modules are changed; the project itself is only read.

    Args:
        project: the folder that is copied.
        place: becomes the copy.
    """

    def __init__(self, project: Path, place: Path):
        self.project, self.place = project, place
        shutil.copytree(project, place, ignore=shutil.ignore_patterns(*LEFT_OUT))

    def write(self, path: str, source: str) -> None:
        """Give the module at `path`, in the copy, another text."""
        file = self.place / path
        file.write_text(source)
        # By time and size alone a compiled module could pass for that of another text.
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()


@dataclass
class Run:
    """Tests that run in a copy, in a process of their own."""

    pid: int
    log: Path
    until: float
    status: int | None = None

    def poll(self) -> int | None:
        """pytest's exit status; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > self.until:
                self.status = HANG
            if self.status is not None:
                self.end()
        return self.status

    def end(self) -> None:
        """End it, and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def failed(self) -> str:
        """The first test that failed, and why, as pytest says it in one line."""
        lines = [
            line for line in self.log.read_text(errors="replace").splitlines() if line[:6] in ("FAILED", "ERROR ")
        ]
        return lines[0].partition(" ")[2] if lines else ""


def import_what_is_slow() -> None:
    """Once, before the first `start`."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)


def start(copy: Copy, tests: Sequence[str], seconds: float, plugins: Sequence[object] = (), *options: str) -> Run:
    """Run pytest on `tests`, in their order, in `copy`; longer than `seconds` is a hang."""
    log = copy.place.with_suffix(".log")
    pid = os.fork()
    if pid == 0:
        _enter(copy, log, [*options, *tests], list(plugins))
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    return Run(pid, log, time.monotonic() + seconds)


def _enter(copy: Copy, log: Path, arguments: list[str], plugins: list[object]) -> None:
    """What a forked process does, to its end."""
    status = 3
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(copy.place)
        os.environ.update(PYTHONPATH=str(copy.place), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        sys.path[:] = [str(copy.place), *(path for path in sys.path if path not in ("", str(copy.project)))]
        here = {name for name in os.listdir(copy.project) if (copy.project / name).is_dir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in here]:
            del sys.modules[name]
        # multiprocessing would import it in every process that a test starts.
        sys.modules["__main__"] = ModuleType("__main__")
        temporary = copy.place.with_suffix(".tmp")
        arguments = [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--basetemp={temporary}",
            "-q",
            "--tb=line",
            "-rfE",
            *arguments,
        ]
        status = int(pytest.main(arguments, plugins))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
