"""Run a function on several gloo ranks, as processes of their own, and get what each returned.

The ranks are forked from a server that has imported torch and transformers but computed nothing: a world of two starts
in a fraction of a second, and no thread of the test process is ever forked.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "accelerate", "hf_sampa"])


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


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(function, rank: int, world_size: int, port: int, result: Path, args: tuple) -> None:
    # Without it accelerate gives the processes of a world more threads than one process has, and other roundings.
    os.environ["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
            # gloo's choice of an interface is flaky where the host name does not resolve.
            GLOO_SOCKET_IFNAME="lo",
        )
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), result)
    except BaseException:
        result.with_suffix(".err").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
