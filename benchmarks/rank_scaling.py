"""Does the cost model tell what gloo ranks take? Times collectives and whole steps on 2, 4 and 8 processes of this machine.

    python benchmarks/rank_scaling.py                              # some ten minutes on two cores
    python benchmarks/rank_scaling.py --ranks 2 --rounds 2 --output_dir out/scaling
    python benchmarks/rank_scaling.py --from_json benchmarks/rank_scaling.json         # the tables once more

First each collective of a step, at messages of 4 KB to 16 MB, to which latency and bandwidth are fitted. Then steps of a small BERT with
AdamW under DDP, SAM, SAMPa and SAMPa with shard_optimizer, beside what cost_model.py makes of the fit and of AdamW on
as many processes as there are cores, each alone.
Prints tables of both and of the errors, and writes rank_scaling.json. `docs/scaling.md` shows those of benchmarks/rank_scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import cost_model
from bench_processes import METHODS, Group
from cost_model import Layout, Link, Machine, Operation, Step, fit_link
from step_time import SIZES, WORKER, add_size, check_sizes, print_progress
from tables import as_table


COLLECTIVES = Path(__file__).with_name("collectives_worker.py")
KINDS = ("swap", "reduce", "broadcast", "all_gather", "all_reduce")
BYTES = [4**n * 1024 for n in range(1, 8)]
# What the model calls them.
LAYOUTS = {
    "adamw_ddp": {"method": "adamw"},
    "sam_replicas": {"method": "sam"},
    "sampa": {"method": "sampa"},
    "sampa_sharded": {"method": "sampa", "shared": True},
}
SMALL = {"layers": 2, "hidden": 256, "batch": 8, "seq": 64, "rounds": 5, "steps": 2}
Report = dict[str, Any]


# ---- Measuring ----


def measure_world(processes: int, cores: int, sizes: dict[str, int], repetitions: int) -> Report:
    """All of one number of processes, ready for JSON."""
    return {
        "processes": processes,
        "collectives": measure_collectives(processes, repetitions),
        **measure_steps(processes, cores, sizes),
    }


def measure_collectives(processes: int, repetitions: int) -> list[Report]:
    """Of each kind and size the median, over the repetitions, of the slowest process's seconds."""
    points = []
    with ExitStack() as stack:
        settings = {"method": "collectives", "repetitions": repetitions}
        group = Group(COLLECTIVES, settings, stack, processes=processes, together=True)
        for kind in KINDS:
            for size in BYTES:
                by_rank = [answer["seconds"] for answer in group.ask(f"{kind} {size}")]
                seconds = median(map(max, zip(*by_rank, strict=True)))
                points.append({"kind": kind, "bytes": size, "seconds": seconds})
        group.tell("stop")
    print_progress(f"{processes} processes: collectives")
    return points


def measure_steps(processes: int, cores: int, sizes: dict[str, int]) -> Report:
    """Steps of all methods, in interleaved rounds, so that a machine that slows down slows all; the first one is a warm-up."""
    rounds: dict[str, list[list[Report]]] = {method: [] for method in ("adamw", *LAYOUTS)}
    with ExitStack() as stack:

        def start(method: str) -> Group:
            settings, alone = {"method": method, "bf16": False, **sizes}, method == "adamw"
            return Group(WORKER, settings, stack, processes=cores if alone else processes, together=not alone)

        groups = {method: start(method) for method in rounds}
        for number in range(1 + sizes["rounds"]):
            for method, group in groups.items():
                rounds[method].append(group.ask("go"))
            print_progress(f"{processes} processes: {f'round {number}' if number else 'warm-up'}")
        profiled = groups["adamw"].ask("profile")
        for group in groups.values():
            group.tell("stop")
    rounds = {method: reports[1:] for method, reports in rounds.items()}
    alone = {
        "seconds": median(seconds_of(rounds.pop("adamw"))),
        "update_seconds": mean(report["milliseconds"]["base step"] for report in profiled) / 1000,
        "weights": profiled[0]["parameters"],
    }
    return {"alone": alone, "steps": {method: summary(reports) for method, reports in rounds.items()}}


def seconds_of(rounds: list[list[Report]]) -> list[float]:
    """Of each round, the mean over the processes."""
    return [mean(report["seconds_per_step"] for report in reports) for reports in rounds]


def summary(rounds: list[list[Report]]) -> Report:
    """Seconds by round; bytes that a process sent, as a mean, or None where nothing counts them."""
    sent = [report["bytes_per_step"] for report in rounds[-1]]
    return {"seconds": seconds_of(rounds), "bytes_sent": None if None in sent else mean(sent)}


# ---- What the model makes of it ----


def operation(kind: str, size: int, processes: int) -> Operation:
    """A measured collective, as the model has it."""
    group = cost_model.Group(2, 1, processes // 2) if kind == "swap" else cost_model.Group(processes, 1, 1)
    return Operation(kind, kind, size, 1, group, "before")


def points_of(measured: Report, kind: str) -> list[tuple[Operation, float]]:
    """Of all worlds, with the seconds that were measured."""
    return [
        (operation(kind, point["bytes"], world["processes"]), point["seconds"])
        for world in measured["worlds"]
        for point in world["collectives"]
        if point["kind"] == kind
    ]


def fit(measured: Report) -> Machine:
    """Latency and bandwidth of each kind, over all sizes and numbers of processes."""
    machine = Machine({}, measured["cores"])

    def link(kind: str) -> Link:
        return fit_link(
            (moved.hops[0], moved.through_a_link, seconds / machine.turns(moved.group.per_node))
            for moved, seconds in points_of(measured, kind)
        )

    return replace(machine, links={kind: link(kind) for kind in KINDS})


def predicted(world: Report, machine: Machine, method: str) -> tuple[float, float]:
    """Seconds of a step, and bytes that a process sends."""
    alone, processes = world["alone"], world["processes"]
    turns = machine.turns(processes)
    step = Step(
        weights=alone["weights"],
        pass_seconds=turns * (alone["seconds"] - alone["update_seconds"]),
        # A core that sends does not compute.
        overlap=0,
        memory_bandwidth=cost_model.ADAMW * 4 * alone["weights"] / alone["update_seconds"] / turns,
    )
    layout = Layout(devices=processes, per_node=processes, **LAYOUTS[method])
    return cost_model.seconds_of_step(step, layout, machine), cost_model.sent_per_process(step, layout)


def as_error(ratio: float) -> str:
    """How far a prediction is off, from what it is of the measured."""
    return f"{round(100 * (ratio - 1)):+d}%"


def fit_table(measured: Report, machine: Machine) -> str:
    """Of each kind: the link, how far single points are off, and those of a bucket's size beside what was measured."""
    rows = []
    for kind in KINDS:
        points, link = points_of(measured, kind), machine.links[kind]
        off = [machine.seconds(moved) / seconds for moved, seconds in points]
        buckets = [
            f"{1000 * seconds:.1f}, {1000 * machine.seconds(moved):.1f}"
            for moved, seconds in points
            if moved.size == cost_model.SAMPA_BUCKET
        ]
        fitted = [f"{1e6 * link.latency:.0f}", f"{link.bandwidth / 1e9:.2f}"]
        errors = [as_error(median(off)), f"{as_error(min(off))} to {as_error(max(off))}"]
        rows.append([kind.replace("_", "-"), *fitted, *errors, *buckets])
    worlds = [f"4 MiB, {world['processes']} ranks, ms" for world in measured["worlds"]]
    return as_table(["collective", "latency, us", "GB/s", "median error", "range", *worlds], rows)


def steps_table(measured: Report, machine: Machine) -> str:
    """Seconds of a step, measured and predicted, and what a process sends, in units of d."""
    rows = []
    for world in measured["worlds"]:
        gradient = 4 * world["alone"]["weights"]
        for method, figures in world["steps"].items():
            seconds, sent = predicted(world, machine, method)
            milliseconds = [1000 * each for each in figures["seconds"]]
            counted = figures["bytes_sent"]
            rows.append(
                [
                    str(world["processes"]),
                    METHODS[method],
                    f"{median(milliseconds):.0f} ({min(milliseconds):.0f} - {max(milliseconds):.0f})",
                    f"{1000 * seconds:.0f}",
                    as_error(1000 * seconds / median(milliseconds)),
                    f"{sent / gradient:.2f}",
                    "" if counted is None else f"{counted / gradient:.2f}",
                ]
            )
    head = ["ranks", "method", "measured, ms", "predicted, ms", "error", "sent, d", "counted, d"]
    return as_table(head, rows)


def errors_table(measured: Report, machine: Machine) -> str:
    """How far predicted steps are off, by number of ranks: of each method, and the median over the methods."""
    rows = []
    for world in measured["worlds"]:
        off = [
            predicted(world, machine, method)[0] / median(figures["seconds"])
            for method, figures in world["steps"].items()
        ]
        rows.append([str(world["processes"]), *map(as_error, off), as_error(median(off))])
    return as_table(["ranks", *(METHODS[method] for method in LAYOUTS), "median"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="processes (default 2 4 8)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each collective (default 9)")
    for name in SIZES:
        add_size(parser, name, SMALL[name])
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("out/scaling"),
        help="folder of rank_scaling.json (default out/scaling)",
    )
    parser.add_argument("--from_json", type=Path, help="measure nothing, show these figures of an earlier run")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in SIZES}
    check_sizes(parser, sizes)
    if wrong := [n for n in args.ranks if n < 2 or n % 2]:
        parser.error(f"--ranks expects even numbers of processes, which make pairs, got {wrong[0]}")
    if args.from_json:
        measured = json.loads(args.from_json.read_text())
    else:
        measured = {"cores": len(os.sched_getaffinity(0)), "settings": sizes, "worlds": []}
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for processes in args.ranks:
            measured["worlds"].append(measure_world(processes, measured["cores"], sizes, args.repetitions))
            (args.output_dir / "rank_scaling.json").write_text(json.dumps(measured, indent=1) + "\n")
    machine = fit(measured)
    tables = (table(measured, machine) for table in (fit_table, steps_table, errors_table))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
