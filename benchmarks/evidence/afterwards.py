"""What becomes of a comparison's trained weights: rounded to a few bits, and trained further on something else.

    python -m hf_sampa.compare benchmarks/evidence/digits.yaml
    python benchmarks/evidence/afterwards.py benchmarks/evidence/afterwards/digits.yaml

Rounded are the weights of all linear layers, each row with a scale of its own, as torchao's ``IntxWeightOnlyConfig`` does it. Called
again, it goes on with what is not in the CSV file yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from tqdm import tqdm

from hf_sampa.compare import config, figures, provenance
from hf_sampa.compare.landscape import main_of
from hf_sampa.compare.runs import Run
from hf_sampa.files import in_place_of


COLUMNS = ("task", "method", "seed", "what", "score", "commit", "torch", "transformers", "command")
TRAINED, NEW, OLD = "trained", "further: new task", "further: old task"


def trained_by(root: Path) -> list[tuple[Run, Path]]:
    """All runs that were scored, each with the folder of its weights. Raises ValueError where there is no report that names them."""
    if not (root / "results.csv").exists():
        raise ValueError(
            f"--folder: expected that of a comparison with results.csv, but {root} has none. Run it first."
        )
    with (root / "results.csv").open(encoding="utf-8") as lines:
        folders = [root / row["folder"] for row in csv.DictReader(lines) if row["phase"] == "score"]
    return [
        (Run(**json.loads((folder / "run.json").read_text(encoding="utf-8"))), folder / "output") for folder in folders
    ]


def scores(
    run: Run, weights: Path, asked: Mapping[str, Any], main: Callable[[list[str]], dict[str, float]]
) -> Iterator[tuple[str, float]]:
    """What was done to the weights, and what they score then."""
    with tempfile.TemporaryDirectory() as place:

        def score(model: Path, **arguments: Any) -> float:
            given = {**run.arguments, "seed": run.seed, **asked["arguments"], **arguments, "model_name_or_path": model}
            given |= {"overwrite_output_dir": True, "disable_tqdm": True, "save_strategy": "no"}
            with redirect_stdout(sys.stderr):
                found = main(config.as_words({name: value for name, value in given.items() if value is not None}))
            return found[f"eval_{run.metric}"]

        scored, further, coarse = (Path(place) / name for name in ("scored", "further", "coarse"))
        yield TRAINED, score(weights, do_train=False, output_dir=scored)
        for bits in asked["bits"]:
            write_rounded(weights, bits, coarse)
            yield f"{bits} bits", score(coarse, do_train=False, output_dir=scored)
        yield NEW, score(weights, output_dir=further, **asked["further"])
        yield OLD, score(further, do_train=False, output_dir=scored)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Every row to integers of `bits` bits, times a scale that fits its largest entry; bit for bit what torchao's tensor stands for."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).eps) / ((high - low) / 2)
    return (weight * (1 / scale)).round().clamp(low, high) * scale


def write_rounded(source: Path, bits: int, target: Path) -> None:
    """A folder like `source`, with the weights of linear layers as `bits` bits would hold them, in fp32."""
    (architecture,) = transformers.AutoConfig.from_pretrained(source).architectures
    model = getattr(transformers, architecture).from_pretrained(source, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(rounded(module.weight.detach(), bits))
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*", "_*", "*.png"), dirs_exist_ok=True)
    model.save_pretrained(target)


def table(rows: list[dict[str, Any]]) -> str:
    """Of the means over the seeds, in percent, and of the differences to the first method on equal seeds."""
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    lost = [kind for kind in kinds if kind not in (TRAINED, NEW)]
    names = {OLD: "forgotten"}
    head = ["task", "method", TRAINED, *(f"{names.get(kind, 'lost at ' + kind)}" for kind in lost), "new task"]
    lines = [head, ["---"] * len(head)]
    by = {(row["task"], row["method"], int(row["seed"]), row["what"]): 100 * float(row["score"]) for row in rows}
    for task in dict.fromkeys(row["task"] for row in rows):
        methods = list(dict.fromkeys(row["method"] for row in rows if row["task"] == task))
        columns: dict[str, list[dict[int, float]]] = {}
        for method in methods:
            seeds = sorted({seed for t, m, seed, _ in by if (t, m) == (task, method)})
            of = {kind: {seed: by[task, method, seed, kind] for seed in seeds} for kind in kinds}
            falls = [{seed: of[TRAINED][seed] - of[kind][seed] for seed in seeds} for kind in lost]
            columns[method] = [of[TRAINED], *falls, of[NEW]]
            lines.append([task, method, *(_cell(figures.mean(list(each.values()))) for each in columns[method])])
        first, *others = methods
        for method in others:
            pairs = zip(columns[method], columns[first], strict=True)
            lines.append([task, f"{method} less {first}", *(_cell(figures.difference(*pair), "+") for pair in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(mean: figures.Mean, sign: str = "") -> str:
    return f"{mean.value:{sign}.1f} ± {mean.half:.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of which comparison, and what is done")
    parser.add_argument("--folder", type=Path, help="the comparison's (default: where it is written by default)")
    parser.add_argument("--csv", type=Path, help="file to write (default: out/CONFIG.csv)")
    options = parser.parse_args(argv)
    asked = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    try:
        comparison = config.read(options.config.parent / asked["comparison"])
        runs = trained_by(options.folder or Path("out/compare") / comparison.name)
    except ValueError as error:
        parser.error(str(error))
    for line in asked["prepare"]:
        subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True)
    file = options.csv or Path("out") / f"{options.config.stem}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(file.open(encoding="utf-8"))) if file.exists() else []
    done = {(row["task"], row["method"], row["seed"]) for row in rows}
    of_all = provenance.provenance()
    versions = {"commit": of_all["commit"], **{name: of_all["versions"][name] for name in ("torch", "transformers")}}
    versions["command"] = f"python {sys.argv[0]} {options.config}"
    script = main_of(comparison.script)
    due = [each for each in runs if (each[0].task, each[0].method, str(each[0].seed)) not in done]
    for run, weights in tqdm(due, unit="run"):
        of_run = {"task": run.task, "method": run.method, "seed": run.seed}
        rows += [
            {**of_run, "what": what, "score": score, **versions} for what, score in scores(run, weights, asked, script)
        ]
        with in_place_of(file) as partial, partial.open("w", newline="", encoding="utf-8") as written:
            writer = csv.DictWriter(written, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{table(rows)}\n{file}")


if __name__ == "__main__":
    main()
