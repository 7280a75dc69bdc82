"""Run a function on several gloo ranks, as processes of their own, and get what each returned; or a script, and what it said.

The processes are forked from a server that has imported everything but computed nothing, see `ready`: a world of two
starts in a fraction of a second, and no thread of the test process is ever forked.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore


DEFAULT_START = multiprocessing.get_all_start_methods()[0]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ready"])


class RankFailed(Exception):
    """A rank raised; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, folder: Path, timeout: float = 240
) -> list[Any]:
    """What ``function(*args)`` returned on each of `world_size` ranks, by rank.

    `function` must be importable. Ranks are set up as a launcher does it, by environment variables, and compute on one
    thread each. Raises RankFailed with the tracebacks of the ranks that raised.
    """
    processes, results, _store = start_ranks(function, world_size, *args, folder=folder)
    for process in processes:
        process.join(timeout)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = [file.read_text() for file in (result.with_suffix(".err") for result in results) if file.exists()]
    if errors:
        raise RankFailed("\n".join(errors))
    if alive:
        raise RankFailed(f"ranks {alive} still ran after {timeout} seconds")
    return [torch.load(result, weights_only=False) for result in results]


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any, folder: Path):
    """Start the ranks of `run_ranks` without waiting.

    Returns the processes, the files they will write, and what they find one another by, which they need while they run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Bound here and now, as torchrun does, so that no other world can come to have the same port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = [folder / f"rank{rank}.pt" for rank in range(world_size)]
    processes = [
        _CONTEXT.Process(target=_enter, args=(function, rank, world_size, store.port, results[rank], args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results, store


@dataclass(frozen=True)
class Ran:
    """How a script ended: its exit code, and what it wrote to its two outputs."""

    returncode: int
    stdout: str
    stderr: str


def nothing() -> None: ...


def run_script(*command: object, folder: Path, processes: int = 1, timeout: float = 240, **kwargs) -> list[Ran]:
    """How ``python script.py ...`` ends on each of `processes` ranks, without the seconds that an interpreter imports for.

    Arguments are those of `start_script`.
    """
    started, outputs, _store = start_script(*command, folder=folder, processes=processes, **kwargs)
    for process in started:
        process.join(timeout)
    alive = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    said = [[output.read_text() for output in of_rank] for of_rank in outputs]
    assert not alive, f"ranks {alive} still ran after {timeout} seconds: {said}"
    return [Ran(process.exitcode, *of_rank) for process, of_rank in zip(started, said, strict=True)]


def start_script(
    *command: object,
    folder: Path,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] = nothing,
):
    """Start the ranks of `run_script` without waiting.

    Args:
        command: the script and its arguments.
        folder: where the outputs go.
        environment: what it is to differ in. What a module reads when it is imported has been read already, unless
        prepare: called before the script, does something about it.

    Returns the processes, the files of their two outputs, and what they find one another by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [[folder / f"{name}{rank}" for name in ("stdout", "stderr")] for rank in range(processes)]
    worlds = [_world(rank, processes, store.port) | (environment or {}) for rank in range(processes)]
    started = [
        _CONTEXT.Process(target=_script, args=([*map(str, command)], world, of_rank, prepare))
        for world, of_rank in zip(worlds, outputs, strict=True)
    ]
    for process in started:
        process.start()
    return started, outputs, store


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _world(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    # Without it accelerate gives the processes of a world more threads than one process has, and other roundings.
    own = {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        # gloo's choice of an interface is flaky where the host name does not resolve.
        own["GLOO_SOCKET_IFNAME"] = "lo"
    return own


def _begin(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    # A child of a server would have one of its own for the workers of its loaders, which imports everything once more.
    multiprocessing.set_start_method(DEFAULT_START, force=True)


def _enter(function, rank: int, world_size: int, port: int, result: Path, args: tuple) -> None:
    _begin(_world(rank, world_size, port))
    try:
        torch.save(function(*args), result)
    except BaseException:
        result.with_suffix(".err").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def _script(command: list[str], environment: dict[str, str], outputs: list[Path], prepare: Callable[[], None]) -> None:
    for own, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), own)
    prepare()
    _run_as_script(command, environment)


def _run_as_script(command: list[str], environment: dict[str, str]) -> None:
    _begin(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """Stands for `subprocess.Popen` of a Python script that talks through pipes, as the benchmarks' workers do."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stderr, **_):
        theirs, self.stdin = (os.fdopen(each, mode, 0) for each, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
        self.stdout, said = (os.fdopen(each, mode, 0) for each, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
        with theirs, said:
            inherited = [Inherited(each.fileno()) for each in (theirs, said, stderr)]
            self._process = _CONTEXT.Process(target=_worker, args=(command[1:], dict(env), inherited))
            self._process.start()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error) -> None:
        self.stdin.close()
        self.stdout.close()
        self._process.join()

    def kill(self) -> None:
        self._process.kill()


class Inherited:
    """A file descriptor that a process is given when it starts."""

    def __init__(self, number: int):
        self.number = number

    def __getstate__(self):
        return reduction.DupFd(self.number)

    def __setstate__(self, given):
        self.number = given.detach()


def _worker(command: list[str], environment: dict[str, str], inherited: list[Inherited]) -> None:
    os.environ.clear()
    for own, given in enumerate(inherited):
        os.dup2(given.number, own)
        os.close(given.number)
    sys.stdin = os.fdopen(0)  # that of the server is closed
    _run_as_script(command, environment)
