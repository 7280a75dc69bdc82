"""What bf16 autocast leaves of SAM's perturbation, of a model that is about to be fine-tuned: a table, and a CSV file.

    python benchmarks/evidence/rounding.py bert-base-uncased

The gradient is that of 32 film remarks of the project's sample, in fp32. Counted are the weights that autocast rounds before it
multiplies them.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed

from hf_sampa.functional import global_norm, perturb
from hf_sampa.monitoring.rounding import Rounded, left_of_displacement


SAMPLE = Path(__file__).parents[2] / "glue" / "sample" / "dev.tsv"
COUNT = 32
RADII = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
COLUMNS = ("model", "weights", "rounded", "rho", "length", "cosine")


def batch(tokenizer) -> dict[str, torch.Tensor]:
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1 : 1 + COUNT]
    texts, labels = [row[0] for row in rows], [int(row[1]) for row in rows]
    return {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}


def load(name: str) -> PreTrainedModel:
    """In fp32; of a folder without weights, with random ones."""
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)


def measured(name: str) -> list[dict]:
    """A row for each radius."""
    set_seed(1)  # for the new head's weights
    model = load(name).eval()
    inputs = batch(AutoTokenizer.from_pretrained(name))
    params = list(model.parameters())
    grads = torch.autograd.grad(model(**inputs).loss, params, allow_unused=True)
    grads = [torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, grads, strict=True)]
    one = {name: each[:1] for name, each in inputs.items()}
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        sdpa_kernel(SDPBackend.MATH),
        Rounded(params) as rounded,
    ):
        model(**one)
    x = [params[i] for i in rounded.to]
    moved, rows = [torch.empty_like(param) for param in params], []
    for rho in RADII:
        perturb(params, grads, rho, global_norm(grads), out=moved)
        length, cosine = left_of_displacement(x, [moved[i] for i in rounded.to], list(rounded.to.values()))
        counts = {"weights": sum(p.numel() for p in params), "rounded": sum(p.numel() for p in x)}
        rows.append({"model": Path(name).name, **counts, "rho": rho, "length": length, "cosine": cosine})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="names on the Hub, or folders; one without weights has random ones"
    )
    parser.add_argument(
        "--csv", type=Path, default=Path("out/rounding.csv"), help="file to write (default: out/rounding.csv)"
    )
    options = parser.parse_args(argv)
    rows = [row for name in options.models for row in measured(name)]
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print("| model | weights | rho | length | cosine | length along it |\n|---|---|---|---|---|---|")
    for row in rows:
        length, cosine = row["length"], row["cosine"]
        print(
            f"| {row['model']} | {row['weights'] / 1e6:.1f} M | {row['rho']:g} | {length:.2f} | {cosine:.2f} | {length * cosine:.2f} |"
        )
    print(options.csv)


if __name__ == "__main__":
    main()
