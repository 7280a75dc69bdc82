"""The demo: a small BERT and a small ViT, each fine-tuned with AdamW, SAM and SAMPa by two processes on the CPU.

    python benchmarks/demo.py            # under three minutes on two cores; `make demo` installs and runs this
    python benchmarks/demo.py --quick    # one epoch each, to see that everything works

BERT, after some training on other film remarks, is fine-tuned on those that ship with the project (glue/sample); the ViT
learns scikit-learn's handwritten digits from 40 % wrong labels. Nothing is fetched. Prints one table and writes one
picture, out/demo/demo.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "demo_runs.py"
# A fixed colour for each method, told apart by colour-blind people too.
METHODS = {"adamw": ("AdamW", "#999999"), "sam": ("SAM", "#E69F00"), "sampa": ("SAMPa", "#0072B2")}
TASKS = {"bert": "BERT, film remarks", "vit": "ViT, digits, 40 % wrong labels"}
WORK = {
    "adamw": "1 gradient, half the batch",
    "sam": "2 gradients, half the batch",
    "sampa": "1 gradient, whole batch",
}


def environment(folder: Path) -> dict[str, str]:
    """One thread per process, no network, caches in `folder`, and the scripts' folders to import from."""
    path = [ROOT, ROOT / "glue", ROOT / "vit_finetune", *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
    }


def train(folder: Path, quick: bool) -> dict[str, dict[str, dict]]:
    """All runs, in two processes; their figures by task and method. Where they fail, shows the log and exits."""
    config = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launch, str(RUNS), *["--quick"] * quick]
    with (folder / "log.txt").open("w+") as log:
        code = subprocess.run(command, cwd=folder, env=environment(folder), stderr=log).returncode
        if code:
            log.seek(0)
            raise SystemExit(
                f"{log.read()}\nExpected all runs to end well, but `{' '.join(command)}` gave {code}: see above."
            )
    return json.loads((folder / "results.json").read_text())


def format_table(results: dict[str, dict[str, dict]]) -> str:
    """The figures of all runs, and what they are."""
    header = f"{'task':<32}{'method':<8}{'accuracy':>9}{'sharpness':>11}{'s/step':>9}{'/ AdamW':>9}   work per process and step"
    lines = [header, "-" * (len(header) + 2)]
    for task, by_method in results.items():
        for method, figures in by_method.items():
            ratio = figures["seconds_per_step"] / by_method["adamw"]["seconds_per_step"]
            lines.append(
                f"{TASKS[task]:<32}{METHODS[method][0]:<8}{figures['accuracy']:>9.1%}{figures['sharpness']:>11.4f}"
                f"{figures['seconds_per_step']:>9.4f}{ratio:>9.2f}   {WORK[method]}"
            )
    lines += [
        "",
        "Accuracy on held-out data after the last epoch, of one seed: this shows that everything works, not which method is",
        "better. Sharpness: how much f, the cross-entropy on the training set, rises from the final weights x to",
        "x + 0.05 g/||g||, g = grad f(x). All methods update on batches of one size with two processes. AdamW and SAM split a",
        "batch; SAMPa computes its two gradients at the same time, each on a whole batch, so that here SAM and SAMPa do equal",
        "work. `make bench` compares at equal batches per process.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict]], path: Path) -> None:
    """One row per task: accuracy over the epochs, final accuracy, final sharpness."""
    figure, rows = plt.subplots(
        len(results), 3, figsize=(11, 6.5), width_ratios=(2, 1, 1), layout="constrained", squeeze=False
    )
    for (task, by_method), (curves, accuracy, sharpness) in zip(results.items(), rows, strict=True):
        for method, figures in by_method.items():
            name, color = METHODS[method]
            epochs, values = zip(*figures["accuracy_curve"], strict=True)
            curves.plot(epochs, [100 * value for value in values], label=name, color=color, marker=".")
        curves.set(title=TASKS[task], xlabel="epoch", ylabel="held-out accuracy (%)")
        curves.legend(frameon=False, loc="lower right")
        draw_bars(accuracy, by_method, "accuracy", "held-out accuracy (%)", "{:.1f}", scale=100)
        draw_bars(sharpness, by_method, "sharpness", "sharpness (rise of the loss)", "{:.3g}")
    for axes in rows.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_bars(axes, by_method: dict[str, dict], key: str, label: str, form: str, scale: float = 1) -> None:
    """One bar per method, its value above it."""
    values = [scale * figures[key] for figures in by_method.values()]
    names, colors = zip(*(METHODS[method] for method in by_method), strict=True)
    bars = axes.bar(names, values, color=colors, width=0.6)
    axes.bar_label(bars, [form.format(value) for value in values], padding=2)
    axes.set(ylabel=label)
    axes.margins(y=0.12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch per run")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("out/demo"),
        help="folder of all results; an earlier demo in it is replaced",
    )
    args = parser.parse_args()
    started, folder = time.perf_counter(), args.output_dir.resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "log.txt").is_file():
        parser.error(
            f"--output_dir: expected a new folder or that of an earlier demo, but {folder} holds something else."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"Two processes make {len(TASKS) * len(METHODS)} runs; their log is {folder / 'log.txt'}.", flush=True)
    results = train(folder, args.quick)
    draw(results, folder / "demo.png")
    print(f"\n{format_table(results)}\n\n{time.perf_counter() - started:.0f} s in all. Picture: {folder / 'demo.png'}")


if __name__ == "__main__":
    main()
