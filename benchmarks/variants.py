"""Every variant on one small task: accuracy, seconds per step, passes and memory.

    python benchmarks/variants.py                                   # everything
    python benchmarks/variants.py --only sam vasso gsam --seeds 5   # these, and AdamW
    python benchmarks/variants.py --epochs 4 --seeds 1 --rhos 1     # a quick look

A ViT of 0.1 million weights learns scikit-learn's handwritten digits, 40 % of the training labels being wrong. Every variant runs in
every timing that it has, with its own defaults but for rho, which is tried at several multiples of its default; the one whose
mean accuracy on 397 test images is best is scored on the other 400, and so is the default. Runs are one process
each, two at a time, so that SAMPa's pair plays both roles in turn there; its seconds per step are measured on pairs of processes
afterwards, and so is what a process of it holds. Seconds per step are those of the fastest run or round. Finished runs are kept in the output folder and not run again. Prints a table and writes variants.json and variants.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
from adjustText import adjust_text
from scipy.stats import t as student
from tqdm import tqdm
from variants_worker import run

from hf_sampa.variants import VARIANTS, find


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


COLORS = {"adamw": "#555555", "sam": "#E69F00", "sampa": "#0072B2"}
LABELS = {"adamw": "AdamW", "sam": "sequential", "sampa": "parallel"}
TIMING_EPOCHS = 2
FOR_ALL_WEIGHTS = [name for name, variant in VARIANTS.items() if not variant.for_adapters]


def make_jobs(names: list[str], rhos: list[float], seeds: int, epochs: int) -> list[dict[str, Any]]:
    """All runs; the first multiple of rho is that of the table's default column."""
    cases = [("adamw", "adamw", 0.0)]
    cases += [(method, name, VARIANTS[name].rho) for name in names for method in VARIANTS[name].timings]
    return [
        {"method": method, "variant": name, "rho": round(rho * multiple, 6), "seed": seed, "epochs": epochs}
        for method, name, rho in cases
        for multiple in (rhos if rho else [1.0])  # AdamW and some variants do not perturb
        for seed in range(seeds)
    ]


def file_of(job: dict[str, Any], folder: Path) -> Path:
    return folder / ("-".join(f"{job[key]}" for key in ("method", "variant", "rho", "seed", "epochs")) + ".json")


def run_all(jobs: list[dict[str, Any]], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Results of all jobs; those that are in `folder` already are read from there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not file_of(job, folder).exists()]
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="run") as bar,
    ):
        futures = {pool.submit(run, job): job for job in missing}
        for future in as_completed(futures):
            write(file_of(futures[future], folder), future.result())
            bar.set_postfix_str(f"{futures[future]['variant']}, {futures[future]['method']}", refresh=False)
            bar.update()
    return [json.loads(file_of(job, folder).read_text()) for job in jobs]


def write(file: Path, content: Any) -> None:
    """Whole or not at all, so that a run that was cut is run again."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


def run_pairs(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What each parallel variant takes and holds on two processes; measured once."""
    missing = [name for name in names if not (folder / f"pair-{name}.json").exists()]
    if missing:
        script = Path(__file__).with_name("variants_pair.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        subprocess.run([*command, str(folder), str(TIMING_EPOCHS), *missing], check=True)
    return {name: json.loads((folder / f"pair-{name}.json").read_text()) for name in names}


def summarize(results: list[dict[str, Any]], pairs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant and timing."""
    # The fastest of several: other work on the machine can only add.
    base = min(result["seconds_per_step"] for result in results if result["method"] == "adamw")
    rows = []
    for method, name in dict.fromkeys((result["method"], result["variant"]) for result in results):
        own = [result for result in results if (result["method"], result["variant"]) == (method, name)]
        by_rho = {rho: [r for r in own if r["rho"] == rho] for rho in dict.fromkeys(result["rho"] for result in own)}
        best = max(by_rho, key=lambda rho: mean(result["validation"] for result in by_rho[rho]))
        default = VARIANTS[name].rho if name in VARIANTS else 0.0
        measured = [pairs[name]] if method == "sampa" else own
        rows.append(
            {
                "variant": name,
                "method": method,
                "default": interval([result["test"] for result in by_rho.get(default, [])]),
                "rho": best,
                "accuracy": interval([result["test"] for result in by_rho[best]]),
                "time": min(result["seconds_per_step"] for result in measured) / base,
                "passes": mean(result["passes"] for result in own),
                "forwards": mean(result["forwards"] for result in own),
                "held": max(result["held"] for result in measured),
            }
        )
    return sorted(rows, key=lambda row: -row["accuracy"][0])


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t over the seeds; NaN where there are too few."""
    if not values:
        return float("nan"), float("nan")
    if len(values) == 1:
        return values[0], float("nan")
    return mean(values), student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5


def format_table(rows: list[dict[str, Any]]) -> str:
    """One line per row, the most accurate first."""
    lines = [
        f"{'variant':12} {'timing':11} {'accuracy, %':>14} {'at rho':>7} {'default rho, %':>15} {'time':>6} {'passes':>7} "
        f"{'+ F':>5} {'held':>6}"
    ]
    for row in rows:
        best, default = (f"{100 * value:.1f} +- {100 * half:.1f}" for value, half in (row["accuracy"], row["default"]))
        rho = f"{row['rho']:g}" if row["rho"] else ""
        lines.append(
            f"{row['variant']:12} {LABELS[row['method']]:11} {best:>14} {rho:>7} {default:>15} {row['time']:6.2f} "
            f"{row['passes']:7.2f} {row['forwards']:5.2f} {row['held']:5.1f}d"
        )
    return "\n".join(lines)


FAR = 10  # points below the median, where a few would squeeze all others into a strip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against time, a panel for each timing, with AdamW in both; what is far below stands on the edge, with its value."""
    figure, panels = plt.subplots(2, 1, figsize=(10, 11), sharex=True, sharey=True, layout="constrained")
    edge = median(100 * row["accuracy"][0] for row in rows) - FAR
    for axes, timing in zip(panels, ("sam", "sampa"), strict=True):
        texts = []
        for method in ("adamw", timing):
            for row in (row for row in rows if row["method"] == method):
                x, y, half = row["time"], 100 * row["accuracy"][0], 100 * row["accuracy"][1]
                far = y < edge
                name = "AdamW" if method == "adamw" else f"{row['variant']}: {y:.0f} %" if far else row["variant"]
                if not far:
                    axes.errorbar(x, y, half, fmt="none", ecolor=COLORS[method], alpha=0.3, elinewidth=1)
                axes.scatter(
                    x, edge if far else y, marker="v" if far else "o", color=COLORS[method], zorder=3, clip_on=False
                )
                texts.append(axes.text(x, edge + 0.2 if far else y, name, fontsize=10))
        axes.set_title(f"{LABELS[timing]} timing, {'one process' if timing == 'sam' else 'two processes'}")
        axes.set_ylabel("accuracy on clean digits, %")
        axes.grid(alpha=0.3)
        axes.margins(x=0.08, y=0.08)
        axes.set_ylim(bottom=edge)
        figure.draw_without_rendering()  # labels are moved on axes that have their size
        adjust_text(texts, ax=axes, arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5})
    panels[-1].set_xlabel("seconds per step, in those of AdamW")
    figure.suptitle("Small ViT, 40 % of the training labels wrong (bars: 95 % interval over seeds)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        default=FOR_ALL_WEIGHTS,
        metavar="NAME",
        help="variants (default: all but those for adapters)",
    )
    parser.add_argument(
        "--rhos", nargs="+", type=float, default=[0.1, 0.5, 1], help="multiples of the default rho (0.1 0.5 1)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the 1000 training images (12)")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time (2)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/variants"), help="folder of runs, table and picture"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing, print the table and write it and the picture."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = parse_args(argv)
    names = list(dict.fromkeys(find(name).name for name in args.only))
    folder = args.output_dir / "runs"
    results = run_all(make_jobs(names, args.rhos, args.seeds, args.epochs), folder, args.workers)
    rows = summarize(results, run_pairs([name for name in names if "sampa" in VARIANTS[name].timings], folder))
    write(args.output_dir / "variants.json", rows)
    print(format_table(rows))
    draw(rows, args.output_dir / "variants.png")
    return rows


if __name__ == "__main__":
    main()
