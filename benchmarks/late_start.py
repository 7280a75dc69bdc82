"""How long a whole run takes whose sharpness-aware steps begin late, against AdamW under DDP on the same two processes.

    python benchmarks/late_start.py                     # BERT of 6 layers x 384 units, update batches of 16 x 64 tokens
    python benchmarks/late_start.py --batch 32 --seq 128 --rounds 5

All runs make the same number of updates, each on a batch of the same size: under DDP each process has half of it, and so it is before
`sampa_start`; from then on each process of the pair has all of it. The runs take turns, a round of each and again, one thread per process.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench_processes import Group
from tables import as_table
from tqdm import tqdm


WORKER = Path(__file__).with_name("late_start_worker.py")
STARTS = (0.0, 0.5, 0.8, 0.9)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each run, by its name, a value for each round."""
    shape = {"layers": options.layers, "hidden": options.hidden, "seq": options.seq, "steps": options.steps}
    settings: dict[str, dict[str, Any]] = {
        "AdamW, DDP": {"method": "adamw_ddp", "start": 0.0, "batch": options.batch // 2}
    }
    settings |= {
        f"SAMPa from {start:g} on": {"method": "sampa", "start": start, "batch": options.batch} for start in STARTS
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    with ExitStack() as stack, tqdm(total=options.rounds * len(settings), unit="run", file=sys.stderr) as told:
        groups = {
            name: Group(WORKER, {**shape, **own}, stack, processes=2, together=True) for name, own in settings.items()
        }
        for _ in range(options.rounds):
            for name, group in groups.items():
                seconds[name].append(max(answer["seconds"] for answer in group.ask("go")))
                told.update()
        for group in groups.values():
            group.tell("stop")
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """A row for each run: its median, and that of its ratios to AdamW in the same round."""
    first = next(iter(seconds.values()))
    rows = []
    for name, found in seconds.items():
        ratios = [own / of_first for own, of_first in zip(found, first, strict=True)]
        rows.append([name, f"{median(found):.2f}", f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"])
    return as_table(["run", "seconds", "of AdamW's", "range"], rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=int, default=6, help="of the model")
    made.add_argument("--hidden", type=int, default=384, help="units of each")
    made.add_argument("--batch", type=int, default=16, help="sequences in an update batch, an even number")
    made.add_argument("--seq", type=int, default=64, help="tokens per sequence")
    made.add_argument(
        "--steps", type=int, default=20, help="updates of a run, besides the first, which is not counted"
    )
    made.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    made.add_argument("--json", type=Path, help="where to write the figures, too")
    return made


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    seconds = measure(options)
    print(table(seconds))
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
    main()
