"""Seconds per step, memory and traffic of AdamW, SAM and SAMPa, measured side by side on the CPU.

    python benchmarks/step_time.py                    # BERT of 6 layers x 384 units, 32 x 128 tokens per process
    python benchmarks/step_time.py --layers 12 --hidden 768 --batch 16 --rounds 5 --json step_time.json

All steps are steps of the real Trainer or SAMPaTrainer with AdamW beneath, one thread per process. AdamW and SAM run as
two independent processes at once, so that two cores are as busy as under SAMPa's two processes, and every process works
on a whole batch. With --ddp, they are measured a second time as one run of both processes at the same batch per process,
AdamW by torch's DistributedDataParallel and SAM by this package: what a person with two devices has without pairs. All
processes stay alive and take turns, a round of each method and again, so that a machine that slows down slows all. The
first round of each is a warm-up and is not counted. One more round of each, which is not counted either, is profiled:
it tells where the milliseconds go.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench_processes import METHODS, PAIRED, ROLES, TOGETHER, Group
from step_phases import PHASES


WORKER = Path(__file__).with_name("step_time_worker.py")
COMPARED = ("adamw", "sam", "sampa")
Report = dict[str, Any]  # of one process about one round; see step_time_worker


def print_progress(line: str) -> None:
    """To where it does not mix with the figures."""
    print(line, file=sys.stderr)


def measure(
    settings: dict[str, Any], methods: Sequence[str] = COMPARED, tell: Callable[[str], None] = print_progress
) -> dict[str, Any]:
    """All rounds of all `methods`; see `summarise` for what comes back.

    Args:
        settings: layers, hidden, batch, seq, rounds, steps and bf16, as on the command line.
        methods: of `bench_processes.METHODS`; those of `COMPARED` at least.
        tell: called with a line after each of `count_rounds` rounds.
    """
    rounds: dict[str, list[list[Report]]] = {method: [] for method in methods}
    with ExitStack() as stack:
        groups = {
            method: Group(WORKER, {"method": method, **settings}, stack, processes=2, together=method in TOGETHER)
            for method in methods
        }
        names = ["warm-up", *(f"round {n + 1} of {settings['rounds']}" for n in range(settings["rounds"])), "profile"]
        for name in names:
            for method, group in groups.items():
                reports = group.ask("profile" if name == "profile" else "go")
                rounds[method].append(reports)
                tell(f"{name}: {METHODS[method]} {_mean(reports, 'seconds_per_step'):.3f} s/step")
        for group in groups.values():
            group.tell("stop")
    return summarise({method: reports[1:] for method, reports in rounds.items()})


def count_rounds(settings: dict[str, Any], methods: Sequence[str] = COMPARED) -> int:
    """Rounds that `measure` runs, with those that are not counted."""
    return (settings["rounds"] + 2) * len(methods)


def _mean(reports: list[Report], key: str) -> float:
    return mean(report[key] for report in reports)


def summarise(rounds: dict[str, list[list[Report]]]) -> dict[str, Any]:
    """Figures of a whole measurement, ready for JSON.

    Args:
        rounds: by method, a list by round of the reports by rank; the last round is the one that was profiled.

    Returns:
        parameters; by method, median seconds per step, those of all rounds, the highest peak memory of a process, and by
        rank what it sent per step and its milliseconds by phase; and ratios of seconds per step, a list by round and
        their median. Ratios are between neighbouring rounds, so that drift cancels.
    """
    timed = {method: reports[:-1] for method, reports in rounds.items()}
    seconds = {method: [_mean(reports, "seconds_per_step") for reports in timed[method]] for method in rounds}
    result: dict[str, Any] = {"parameters": rounds["sampa"][0][0]["parameters"], "methods": {}, "ratios_by_round": {}}
    for method, by_round in timed.items():
        result["methods"][method] = {
            "seconds_per_step": median(seconds[method]),
            "rounds": seconds[method],
            "peak_bytes_per_process": max(report["peak_bytes"] for reports in by_round for report in reports),
            "processes": [
                {"bytes_sent_per_step": report["bytes_per_step"], "milliseconds": report["milliseconds"]}
                for report in rounds[method][-1]
            ],
        }
    pairs = [("sampa", "adamw"), ("sam", "sampa"), ("sam", "adamw")]
    pairs += [(method, "adamw") for method in rounds if method not in COMPARED]
    pairs += [("sampa", "adamw_ddp"), ("sam_replicas", "sampa")] if "adamw_ddp" in rounds else []
    for above, below in pairs:
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        result["ratios_by_round"][f"{above}_over_{below}"] = ratios
        result[f"{above}_over_{below}"] = median(ratios)
    return result


def format_table(settings: dict[str, Any], result: dict[str, Any]) -> str:
    """The figures as a person reads them: methods against each other, then where the milliseconds go."""
    precision = "bf16 autocast" if settings["bf16"] else "fp32"
    lines = [
        f"BERT, {settings['layers']} layers x {settings['hidden']} units, {result['parameters'] / 1e6:.1f} M weights, "
        f"{precision}; {settings['batch']} x {settings['seq']} tokens and one thread per process",
        f"medians of {settings['rounds']} interleaved rounds of {settings['steps']} steps",
        "",
        f"{'method':<15}{'processes':<18}{'s/step':>8}{'/ AdamW':>10}{'peak memory':>14}",
        f"{'':<15}{'':<18}{'':>8}{'':>10}{'per process':>14}",
    ]
    for method, figures in result["methods"].items():
        processes = "2, one pair" if method in PAIRED else "2, one run" if method in TOGETHER else "2, independent"
        to_adamw = 1.0 if method == "adamw" else result[f"{method}_over_adamw"]
        memory = f"{figures['peak_bytes_per_process'] / 1e9:.2f} GB"
        lines.append(
            f"{METHODS[method]:<15}{processes:<18}{figures['seconds_per_step']:>8.3f}{to_adamw:>10.2f}{memory:>14}"
        )
    names = {
        ratio: " / ".join(METHODS[method] for method in ratio.split("_over_")) for ratio in result["ratios_by_round"]
    }
    shown = [ratio for ratio in names if ratio.startswith("sampa_over") or ratio.endswith("over_sampa")]
    lines += ["", "    ".join(f"{names[ratio]} {result[ratio]:.2f}" for ratio in shown)]
    return "\n".join([*lines, "", *_format_phases(result)])


def _format_phases(result: dict[str, Any]) -> list[str]:
    gradient = 4 * result["parameters"]
    header = f"{'method':<15}{'process':<13}" + "".join(f"{phase:>{len(phase) + 2}}" for phase in PHASES)
    lines = [
        f"milliseconds per step, one profiled round; sent per step, and as a multiple of one gradient, {gradient / 1e6:.1f} MB",
        "",
        f"{header}{'total':>9}{'sent':>12}{'':>7}",
    ]
    for method, figures in result["methods"].items():
        for rank, process in enumerate(figures["processes"]):
            spent, sent = process["milliseconds"], process["bytes_sent_per_step"]
            role = ROLES[rank] if method in PAIRED else str(rank)
            cells = "".join(f"{spent[phase]:>{len(phase) + 2}.1f}" for phase in PHASES)
            traffic = "  not counted" if sent is None else f"{sent / 1e6:>9.1f} MB{sent / gradient:>7.3f}"
            lines.append(f"{METHODS[method]:<15}{role:<13}{cells}{sum(spent.values()):>9.1f}{traffic}")
    return lines


SIZES = {"layers": 6, "hidden": 384, "batch": 32, "seq": 128, "rounds": 7, "steps": 2}
HELPS = {
    "layers": "layers of the BERT",
    "hidden": "its units; a multiple of 32, the size of a head",
    "batch": "sequences per process and step",
    "seq": "tokens per sequence, at most 512",
    "rounds": "rounds that count, per method",
    "steps": "steps per round",
}


def add_size(parser: argparse.ArgumentParser, name: str, default: int | None = None) -> None:
    """An option for one of `SIZES`."""
    default = SIZES[name] if default is None else default
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{HELPS[name]} (default {default})")


def check_sizes(parser: argparse.ArgumentParser, sizes: dict[str, int]) -> None:
    """End with a message where a size cannot be measured."""
    for name, value in sizes.items():
        if value < 1:
            parser.error(f"--{name} expects a whole number of at least 1, got {value}")
    if sizes["hidden"] % 32:
        parser.error(f"--hidden expects a multiple of 32, the size of an attention head, got {sizes['hidden']}")
    if sizes["seq"] > 512:
        parser.error(f"--seq expects at most 512 tokens, the places that BERT has, got {sizes['seq']}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES:
        add_size(parser, name)
    parser.add_argument("--bf16", action="store_true", help="forward passes under bf16 autocast")
    parser.add_argument(
        "--ddp", action="store_true", help="measure AdamW and SAM in data parallel over both processes, too"
    )
    parser.add_argument(
        "--shard_optimizer", action="store_true", help="measure SAMPa with sharded optimizer state, too"
    )
    parser.add_argument("--json", type=Path, help="also write the settings and figures to this file")
    return parser


def main() -> None:
    parser = make_parser()
    settings = vars(parser.parse_args())
    json_path = settings.pop("json")
    optional = dict.fromkeys(("adamw_ddp", "sam_replicas"), settings.pop("ddp"))
    optional["sampa_sharded"] = settings.pop("shard_optimizer")
    check_sizes(parser, {name: settings[name] for name in SIZES})
    result = measure(settings, [method for method in METHODS if optional.get(method, True)])
    print(format_table(settings, result))
    if json_path is not None:
        json_path.write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
