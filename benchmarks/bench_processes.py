"""Groups of training processes that the benchmarks start: a worker per process, told line by line what to do next.

A worker is a script that takes its settings as JSON, reads one line of its input for each thing to do (`stop` ends it)
and answers each with one line of JSON on its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore


METHODS = {
    "adamw": "AdamW",
    "adamw_ddp": "AdamW, DDP",
    "sam": "SAM",
    "sam_replicas": "SAM, replicas",
    "sampa": "SAMPa",
    "sampa_sharded": "SAMPa sharded",
}
PAIRED = ("sampa", "sampa_sharded")
TOGETHER = (
    "adamw_ddp",
    "sam_replicas",
    *PAIRED,
)  # one world of two processes; of the others every process is one of its own
ROLES = ("PERTURBED", "LOOKAHEAD")  # of the two processes of a pair, by rank


class Group:
    """Processes with one method, each waiting for what to do next.

    Args:
        worker: the script.
        settings: what the worker is given; its `method`, of `METHODS` or not, is what the group is called.
        stack: ends the processes when it is closed.
        processes: how many.
        together: whether they are one world, as a launcher would start it, or independent of each other.
        variables: of their environment, beside one thread and, where they are `together`, what a launcher sets.
    """

    def __init__(
        self,
        worker: Path,
        settings: dict[str, Any],
        stack: ExitStack,
        *,
        processes: int,
        together: bool,
        variables: Mapping[str, str] | None = None,
    ):
        self.name = METHODS.get(settings["method"], settings["method"])
        self.logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        env = _environment() | (variables or {})
        # Bound here and now, so that no other world can come to have the same port.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if together else None
        self.processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(worker), json.dumps(settings)],
                    env=env | (_world(rank, processes, self._store.port) if together else {}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,  # nothing is left to flush into the pipe of a process that has died
                )
            )
            for rank, log in enumerate(self.logs)
        ]
        # Runs before the processes are waited for, also when one of them has failed.
        stack.callback(self._kill)

    def ask(self, line: str) -> list[dict[str, Any]]:
        """Let all processes do what `line` says at the same time; their answers, by rank."""
        self.tell(line)
        answers = [self._answer_of(process) for process in self.processes]
        if not all(answers):
            raise SystemExit(f"A process of {self.name} expected to train ended early. {self._read_logs()}")
        return [json.loads(answer) for answer in answers]

    @staticmethod
    def _answer_of(process: subprocess.Popen) -> bytes:
        """The next line that is an object; empty where the process has ended. gloo of torch 2.9 tells of its connections there, too."""
        return next((line for line in process.stdout if line.startswith(b"{")), b"")

    def tell(self, line: str) -> None:
        """Say `line` to all processes."""
        for process in self.processes:
            # A process that is gone is noticed by its missing answer.
            with suppress(BrokenPipeError):
                process.stdin.write(f"{line}\n".encode())

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _read_logs(self) -> str:
        parts = []
        for rank, log in enumerate(self.logs):
            log.seek(0)
            parts.append(f"\n--- log of process {rank}\n{log.read()}")
        return "".join(parts)


def _environment() -> dict[str, str]:
    """This process's, for workers with one thread and, until `_world` says otherwise, without a launcher."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        env.pop(name, None)
    return env


def _world(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun would set, whose own process holds the store by which the others find one another, too."""
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
