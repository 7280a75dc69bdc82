"""Seconds per step, memory and traffic of AdamW, SAM and SAMPa, measured side by side on the CPU.

    python benchmarks/step_time.py                    # BERT of 6 layers x 384 units, 32 x 128 tokens per process
    python benchmarks/step_time.py --layers 12 --hidden 768 --batch 16 --rounds 5 --json step_time.json

All steps are steps of the real Trainer or SAMPaTrainer with AdamW beneath, one thread per process. AdamW and SAM run as
two independent processes at once, so that two cores are as busy as under SAMPa's two processes, and every process works
on a whole batch. All six processes stay alive and take turns: a round of AdamW, a round of SAM, a round of SAMPa, and
again, so that a machine that slows down slows all three. The first round of each is a warm-up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import mean, median


METHODS = {"adamw": "AdamW", "sam": "SAM", "sampa": "SAMPa"}
WORKER = Path(__file__).with_name("step_time_worker.py")


class Group:
    """Two processes with one method, each waiting for its next round."""

    def __init__(self, method: str, settings: dict[str, int], stack: ExitStack):
        self.method = method
        port = _free_port()
        self.logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        self.processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(WORKER), json.dumps({"method": method, **settings})],
                    env=_environment(method, rank, port),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.logs[rank],
                    bufsize=0,  # nothing is left to flush into the pipe of a process that has died
                )
            )
            for rank in range(2)
        ]
        # Runs before the processes are waited for, also when one of them has failed.
        stack.callback(self.kill)

    def round(self) -> dict[str, float]:
        """Let both processes run one round at the same time; the mean of their figures."""
        self._tell(b"go\n")
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            raise SystemExit(f"A process of {METHODS[self.method]} expected to train ended early. {self._read_logs()}")
        reports = [json.loads(line) for line in lines]
        return {key: mean(report[key] for report in reports) for key in reports[0]}

    def stop(self) -> None:
        self._tell(b"stop\n")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _tell(self, line: bytes) -> None:
        for process in self.processes:
            # A process that is gone is noticed by its missing answer.
            with suppress(BrokenPipeError):
                process.stdin.write(line)

    def _read_logs(self) -> str:
        parts = []
        for rank, log in enumerate(self.logs):
            log.seek(0)
            parts.append(f"\n--- log of process {rank}\n{log.read()}")
        return "".join(parts)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(method: str, rank: int, port: int) -> dict[str, str]:
    """What the launcher would set: a world of two for SAMPa, none for the independent processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if method == "sampa":
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return env


def measure(settings: dict[str, int]) -> dict:
    """All rounds of all methods; see `summarise` for what comes back."""
    rounds = {method: [] for method in METHODS}
    with ExitStack() as stack:
        groups = [Group(method, settings, stack) for method in METHODS]
        for number in range(settings["rounds"] + 1):
            for group in groups:
                figures = group.round()
                if number > 0:
                    rounds[group.method].append(figures)
                label = f"round {number} of {settings['rounds']}" if number else "warm-up"
                print(f"{label}: {METHODS[group.method]} {figures['seconds_per_step']:.3f} s/step", file=sys.stderr)
        for group in groups:
            group.stop()
    return summarise(rounds)


def summarise(rounds: dict[str, list[dict[str, float]]]) -> dict:
    """Medians over the rounds. A ratio is the median of the ratios of neighbouring rounds, so that drift cancels."""
    seconds = {method: [figures["seconds_per_step"] for figures in rounds[method]] for method in METHODS}

    def ratio(above: str, below: str) -> float:
        return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    return {
        "parameters": int(rounds["sampa"][0]["parameters"]),
        "methods": {
            method: {
                "seconds_per_step": median(seconds[method]),
                "rounds": seconds[method],
                "peak_bytes_per_process": max(figures["peak_bytes"] for figures in rounds[method]),
                "bytes_sent_per_step_and_process": median(figures["bytes_per_step"] for figures in rounds[method]),
            }
            for method in METHODS
        },
        "sampa_over_adamw": ratio("sampa", "adamw"),
        "sam_over_sampa": ratio("sam", "sampa"),
        "sam_over_adamw": ratio("sam", "adamw"),
    }


def format_table(settings: dict[str, int], result: dict) -> str:
    """The figures as a person reads them."""
    to_adamw = {"adamw": 1.0, "sam": result["sam_over_adamw"], "sampa": result["sampa_over_adamw"]}
    lines = [
        f"BERT, {settings['layers']} layers x {settings['hidden']} units, {result['parameters'] / 1e6:.1f} M weights; "
        f"{settings['batch']} x {settings['seq']} tokens and one thread per process",
        f"medians of {settings['rounds']} interleaved rounds of {settings['steps']} steps",
        "",
        f"{'method':<8}{'processes':<18}{'s/step':>8}{'/ AdamW':>10}{'peak memory':>14}{'sent per step':>16}",
        f"{'':<8}{'':<18}{'':>8}{'':>10}{'per process':>14}{'and process':>16}",
    ]
    for method, name in METHODS.items():
        figures = result["methods"][method]
        processes = "2, one pair" if method == "sampa" else "2, independent"
        memory = f"{figures['peak_bytes_per_process'] / 1e9:.2f} GB"
        sent = f"{figures['bytes_sent_per_step_and_process'] / 1e6:.1f} MB"
        lines.append(
            f"{name:<8}{processes:<18}{figures['seconds_per_step']:>8.3f}{to_adamw[method]:>10.2f}{memory:>14}{sent:>16}"
        )
    lines += [
        "",
        f"SAMPa / AdamW {result['sampa_over_adamw']:.2f}    SAM / SAMPa {result['sam_over_sampa']:.2f}    "
        f"one gradient is {4 * result['parameters'] / 1e6:.1f} MB",
    ]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 6, "hidden": 384, "batch": 32, "seq": 128, "rounds": 7, "steps": 2}
    helps = {
        "layers": "layers of the BERT",
        "hidden": "its units; a multiple of 32, the size of a head",
        "batch": "sequences per process and step",
        "seq": "tokens per sequence, at most 512",
        "rounds": "rounds that count, per method",
        "steps": "steps per round",
    }
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{helps[name]} (default {default})")
    parser.add_argument("--json", type=Path, help="also write the settings and figures to this file")
    return parser


def main() -> None:
    parser = make_parser()
    settings = vars(parser.parse_args())
    json_path = settings.pop("json")
    for name, value in settings.items():
        if value < 1:
            parser.error(f"--{name} expects a whole number of at least 1, got {value}")
    if settings["hidden"] % 32:
        parser.error(f"--hidden expects a multiple of 32, the size of an attention head, got {settings['hidden']}")
    result = measure(settings)
    print(format_table(settings, result))
    if json_path is not None:
        json_path.write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
