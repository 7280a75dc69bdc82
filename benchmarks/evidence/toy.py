"""The paper's Figure 1: f(x) = ||x||^2 by SAM, by SAMPa, and by two ways to save SAM a gradient. A table, a CSV file, and a picture.

    python benchmarks/evidence/toy.py

Every method runs in Trainer, with SGD beneath.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.compare.pictures import Look
from hf_sampa.compare.provenance import provenance


METHODS = {
    "SAM": {"method": "sam"},
    "SAMPa-0": {"lmbda": 0.0},
    "SAMPa-0.5": {"lmbda": 0.5},
    "OptSAM": {"method": "sam", "variant": "optsam"},
    "RandSAM": {"method": "sam", "variant": "randsam"},
}
STEPS, RATE, RHO = 400, 0.1, 0.1
LAST = 100  # of the steps, over which the table says how far away a method stays
DRAWN = 80  # the first steps
COLUMNS = ("method", "step", "squared_norm", "commit", "torch", "transformers", "command")


class Quadratic(nn.Module):
    """f(x) = ||x||^2, of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.x**2).sum()}


class Norms(TrainerCallback):
    """||grad f(x_t)||^2 of every t."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Quadratic, **kwargs: Any) -> None:
        self.found.append(4 * float(model.x.detach().square().sum()))


def course(settings: dict[str, Any]) -> list[float]:
    """Of the squared norm of the gradient, a value for each step."""
    model, norms = Quadratic(), Norms()
    with tempfile.TemporaryDirectory() as folder:
        args = SAMPaTrainingArguments(
            folder, max_steps=STEPS, rho=RHO, per_device_train_batch_size=1, max_grad_norm=0, save_strategy="no",
            report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=True, **settings,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        SAMPaTrainer(
            model=model, args=args, train_dataset=[{"labels": 0}] * 8, optimizers=(optimizer, constant), callbacks=[norms]
        ).train()  # fmt: skip
    return norms.found


def draw(courses: dict[str, list[float]], file: Path) -> None:
    figure, look = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained"), Look(list(METHODS))
    axes = figure.subplots()
    for method, found in courses.items():
        axes.semilogy(found[:DRAWN], markevery=10, markersize=4, linewidth=1, **look.of(method))
    axes.set(xlabel="step (updates of the weights)", ylabel=r"$\|\nabla f(x_t)\|^2$")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("out/toy.csv"), help="file to write, and beside it a picture")
    options = parser.parse_args(argv)
    courses = {method: course(settings) for method, settings in METHODS.items()}
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        of = provenance()
        origin = (
            of["commit"],
            of["versions"]["torch"],
            of["versions"]["transformers"],
            "python benchmarks/evidence/toy.py",
        )
        writer.writerows(
            (method, step, norm, *origin) for method, found in courses.items() for step, norm in enumerate(found)
        )
    draw(courses, picture := options.csv.with_suffix(".png"))
    print(
        f"Squared norm of the gradient in the last {LAST} of {STEPS} steps:\n\n| method | smallest | largest |\n|---|---|---|"
    )
    for method, found in courses.items():
        print(f"| {method} | {min(found[-LAST:]):.1e} | {max(found[-LAST:]):.1e} |")
    print(f"{options.csv}\n{picture}")


if __name__ == "__main__":
    main()
