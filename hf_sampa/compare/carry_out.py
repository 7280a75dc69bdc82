"""Carrying out runs: each as a launched process group of its own, several at a time, from where they were interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints import is_whole
from .config import as_words
from .holding import HELD, held
from .provenance import provenance
from .rows import MEASURED
from .runs import TIME, Failed, Run


SECONDS_TO_END = 20.0  # after which a process that was asked to end is killed
LAST_LINES = 12


def slots(jobs: int | None = None, processes: int = 1) -> list[dict[str, str]]:
    """Environments of runs that share the machine: one for each GPU, or, without any, for each core; or `jobs`.

    Of GPUs, those that this process sees, each run gets as many as it has `processes`.
    """
    devices = _visible_devices()
    places = max(1, len(devices) // processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = jobs or (places if devices else max(1, cores // processes))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // (count * processes))), "TOKENIZERS_PARALLELISM": "false"}
    if not devices:
        return [threads] * count
    of_place = [devices[i * processes : (i + 1) * processes] for i in range(places)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": ",".join(of_place[i % places])} for i in range(count)]


def _visible_devices() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def alone() -> list[dict[str, str]]:
    """That of a run which has the machine for itself: all devices, and as many threads as its launcher gives each process."""
    return [{"TOKENIZERS_PARALLELISM": "false"}]


class Executor:
    """Carries out runs of `script` under `root`; what is done already is left as it is.

    Args:
        script: a fine-tuning script, which writes ``all_results.json`` and ``trainer_state.json`` into its output folder.
        root: of the comparison's files.
        launcher: the command that starts it, before ``launch --config NAME SCRIPT ...``.
    """

    def __init__(self, script: Path, root: Path, launcher: Sequence[str] = (sys.executable, "-m", "hf_sampa")):
        self.script, self.root, self.launcher = script, root, launcher
        self._going: set[subprocess.Popen] = set()
        self._lock, self._ending = Lock(), False

    def carry_out(self, runs: Sequence[Run], environments: Sequence[dict[str, str]], what: str) -> None:
        """All of `runs`, as many at a time as there are `environments`. A run that fails is noted, and the others go on.

        Raises:
            ValueError: a run that is done has no such score, or the script takes no such argument, as in all others.
            KeyboardInterrupt: as it came, and SystemExit for a signal to end: once all processes that were started have ended.
        """
        due = [run for run in runs if run.result(self.root) is None]
        free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in environments:
            free.put(environment)

        def take(run: Run) -> Failed | None:
            environment = free.get()
            try:
                return self._one(run, environment)
            finally:
                free.put(environment)

        pool = ThreadPoolExecutor(len(environments))
        with tqdm(total=len(runs), initial=len(runs) - len(due), desc=what, unit="run", smoothing=0.1) as bar, pool:
            try:
                for run, failed in _as_they_end(pool, take, due):
                    bar.set_postfix_str(f"{run.task}, {run.method}, seed {run.seed}")
                    bar.update()
                    if failed:
                        bar.write(told(failed, self.root), file=sys.stderr)
            except BaseException:
                self._end()
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, run: Run, environment: dict[str, str]) -> Failed | None:
        folder = run.folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output"
        with held(folder / HELD, lambda: self._ending) as inherited, (folder / "log.txt").open("ab") as log:
            if self._ending or run.result(self.root) is not None:  # by another call, which had it until now
                return None
            run.write(self.root, "run.json", asdict(run))
            (folder / "failed.json").unlink(missing_ok=True)
            begun, continuing = log.tell(), _continuing(output)
            words = ["launch", "--config", run.launch, str(self.script)]
            words += as_words({**run.arguments, "seed": run.seed, "output_dir": output, **continuing})
            started = time.time()
            code = self._call([*self.launcher, *words], environment, log, inherited)
            if code is None:
                return None
            if code:
                return self._failed(run, code, _end_of(folder / "log.txt", begun))
            try:
                found = _found(output)
            except (OSError, ValueError, KeyError) as error:
                return self._failed(run, 0, f"{type(error).__name__}: {error}")
            # Of a run that went on there are more, which nobody has counted.
            seconds = None if "resume_from_checkpoint" in continuing else round(time.time() - started, 1)
            run.write(self.root, "result.json", {**found, **provenance(), "seconds": seconds, "command": words})
            for checkpoint in output.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        if run.phase == TIME and found["seconds_per_step"] is None:
            raise ValueError(
                "time: expected train_seconds_per_step or train_steps_per_second in all_results.json of the script, got neither. Leave time out."
            )
        if run.phase != TIME:
            run.score(self.root)
        return None

    def _failed(self, run: Run, code: int, said: str) -> Failed:
        run.write(self.root, "failed.json", {"code": code, "said": said})
        if "unrecognized arguments" in said:
            raise ValueError(f"{self.script.name} takes no such argument:\n{said}\nCorrect the configuration.")
        return Failed(run, code, said)

    def _call(
        self, command: list[str], environment: dict[str, str], log: Any, inherited: tuple[int, ...]
    ) -> int | None:
        """Its exit code; None where all is to end."""
        with self._lock:
            if self._ending:
                return None
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                start_new_session=True,
            )
            self._going.add(process)
        code = process.wait()
        with self._lock:
            self._going.discard(process)
            return None if self._ending else code

    def _end(self) -> None:
        """Ask all that was started to end, and see that it does."""
        with self._lock:
            self._ending, going = True, list(self._going)
        for process in going:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + SECONDS_TO_END
        for process in going:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            _signal(process, signal.SIGKILL)  # what it started may be there still


def told(failed: Failed, root: Path) -> str:
    """For the person in front of it."""
    run = failed.run
    place = run.folder(root)
    return f"FAILED ({failed.code}): {run.phase}, {run.task}, {run.method}, seed {run.seed}; the end of {place / 'log.txt'}:\n{failed.said}"


def _as_they_end(pool: ThreadPoolExecutor, take: Any, runs: Iterable[Run]) -> Iterator[tuple[Run, Failed | None]]:
    going: dict[Future, Run] = {pool.submit(take, run): run for run in runs}
    while going:
        done, _ = wait(going, return_when=FIRST_COMPLETED)
        for future in done:
            yield going.pop(future), future.result()


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # they have ended
        pass


def _continuing(output: Path) -> dict[str, Any]:
    """What the script is to be told of an output folder that is there already; checkpoints that were being written are removed."""
    for checkpoint in output.glob("checkpoint-*"):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    if any(output.glob("checkpoint-*")):
        return {"resume_from_checkpoint": "true"}
    return {"overwrite_output_dir": "true"} if output.is_dir() and any(output.iterdir()) else {}


def _end_of(log: Path, begun: int) -> str:
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:])


def _found(output: Path) -> dict[str, Any]:
    """What a script left of a run: its metrics, their course, and how long a step took."""
    metrics = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluations = [line for line in history if any(name.startswith("eval_") for name in line)]
    last = {}
    for line in history:
        last |= {name: value for name, value in line.items() if name in MEASURED.values()}
    per_second = metrics.get("train_steps_per_second")
    seconds = metrics.get("train_seconds_per_step", 1 / per_second if per_second else None)
    return {"metrics": {**metrics, **last}, "evaluations": evaluations, "seconds_per_step": seconds}
