"""How alike SAMPa's ascent gradient, taken at the look-ahead weights, is to the one at the weights: the paper's Figure 4, of own runs.

    python -m hf_sampa.compare benchmarks/evidence/paper.yaml
    python benchmarks/evidence/cosines.py out/compare/evidence/paper

Reads what ``--diagnostics_steps`` logged, of every run of a comparison; writes a CSV file and a picture.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from statistics import median
from typing import Any

from hf_sampa.compare.pictures import Look, courses


NAMES = ("lookahead_cosine", "lookahead_distance")
COLUMNS = ("task", "method", "seed", "step", "epoch", *NAMES, "commit", "torch", "transformers", "folder")
PAPER = 0.99  # above which it is said to stay


def measured(root: Path) -> list[dict[str, Any]]:
    """A row for each measurement of each run under `root`, in their order."""
    rows = []
    for file in sorted(root.glob("runs/score/*/*/*/result.json")):
        run = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))
        state = json.loads((file.parent / "output" / "trainer_state.json").read_text(encoding="utf-8"))
        result = json.loads(file.read_text(encoding="utf-8"))
        of_run = {name: run[name] for name in COLUMNS[:3]}
        of_run |= {
            "commit": result["commit"],
            **{name: result["versions"][name] for name in ("torch", "transformers")},
        }
        of_run["folder"] = str(file.parent.relative_to(root))  # by which results.csv has the command
        rows += [
            {**of_run, **{name: line[name] for name in ("step", "epoch", *NAMES)}}
            for line in state["log_history"]
            if NAMES[0] in line
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The smallest and the middle cosine of each task and method, and how many are above the paper's."""
    lines = ["| task | method | measurements | smallest | median | above 0.99 |", "|---|---|---|---|---|---|"]
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        found = [row[NAMES[0]] for row in rows if (row["task"], row["method"]) == (task, method)]
        above = sum(each > PAPER for each in found) / len(found)
        lines.append(f"| {task} | {method} | {len(found)} | {min(found):.3f} | {median(found):.3f} | {above:.0%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a comparison, whose runs had --diagnostics_steps")
    parser.add_argument(
        "--csv", type=Path, default=Path("out/cosines.csv"), help="file to write, and beside it a picture"
    )
    options = parser.parse_args(argv)
    rows = measured(options.folder)
    if not rows:
        parser.error(
            f"folder: expected that of a comparison with SAMPa's runs and diagnostics_steps, but no run in {options.folder} has logged "
            "a lookahead_cosine."
        )
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    by_task: dict[str, dict[str, dict[int, list]]] = {}
    for row in rows:
        of_seeds = by_task.setdefault(row["task"], {}).setdefault(row["method"], {})
        of_seeds.setdefault(row["seed"], []).append([row["step"], 1 - row[NAMES[0]]])
    runs = {task: {method: list(of.values()) for method, of in methods.items()} for task, methods in by_task.items()}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    courses(
        runs,
        Look(methods),
        "1 - cosine of the gradients at $y_t$ and at $x_t$",
        picture := options.csv.with_suffix(".png"),
        scale="log",
    )
    print(f"{table(rows)}\n{options.csv}\n{picture}")


if __name__ == "__main__":
    main()
