"""What sharpness is, and what SAMPa does to it: the loss around the weights that AdamW and SAMPa find.

    python benchmarks/sharpness.py                          # under a minute on one core; nothing is fetched
    python benchmarks/sharpness.py --seeds 1 --epochs 1     # the smallest run

A net of one hidden layer learns scikit-learn's handwritten digits three times from the first weights of each seed: with
Trainer and AdamW, and with SAMPaTrainer at two radii. Then the loss on the whole training set is computed at weights that
are moved by a distance r, along the sharpest direction (the eigenvector of the largest eigenvalue of the Hessian) and
along random ones. Prints a table and writes a picture, sharpness.png, with matplotlib.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from transformers import PrinterCallback, Trainer, set_seed
from transformers.utils import logging

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.monitoring.curvature import hessian_product


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


# A fixed colour for each run, told apart by colour-blind people too; AdamW's and SAMPa's are the demo's. None is AdamW.
RADII: dict[float | None, tuple[str, str]] = {
    None: ("AdamW", "#999999"),
    0.1: ("SAMPa, rho 0.1", "#56B4E9"),
    0.3: ("SAMPa, rho 0.3", "#0072B2"),
}
# How far the weights are moved along each kind of direction. A random one hardly meets the sharpest few of 4810.
STEPS = torch.arange(-20, 21)  # with an exact 0 in the middle, which torch.linspace(-1, 1, 41) has not
DISTANCES = {"sharpest": STEPS / 20, "random": STEPS / 4}
TITLES = {"sharpest": "along the sharpest direction", "random": "along random directions, mean of 20"}
RANDOM_DIRECTIONS = 20
POWER_ITERATIONS = 100


class Net(nn.Module):
    """64 grey values, 64 units, 10 classes; cross-entropy, as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load() -> list[dict[str, Tensor]]:
    """1000 images to train on and 797 to test, each part as one batch."""
    digits = load_digits()
    images = torch.from_numpy(digits.data).float() / 8 - 1  # from 0 ... 16 to -1 ... 1
    labels = torch.from_numpy(digits.target)
    parts = train_test_split(np.arange(len(labels)), test_size=797, random_state=0, stratify=digits.target)
    return [{"images": images[part], "labels": labels[part]} for part in parts]


def train(radius: float | None, seed: int, epochs: float, batch: dict[str, Tensor]) -> Net:
    """The net after so many epochs, with AdamW (`radius` None) or SAMPa."""
    set_seed(seed)
    model = Net()
    rows = [{"images": image, "labels": label} for image, label in zip(*batch.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = SAMPaTrainingArguments(
            folder,
            rho=radius,
            seed=seed,
            num_train_epochs=epochs,
            per_device_train_batch_size=50,
            learning_rate=3e-3,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = (Trainer if radius is None else SAMPaTrainer)(model=model, args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def sharpest_direction(model: Net, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Largest eigenvalue of the Hessian and its eigenvector ``(d,)``, of length one, by power iteration."""
    params = list(model.parameters())
    product = hessian_product([model(**batch)["loss"]], params)
    vector = [torch.randn(param.shape, generator=torch.Generator().manual_seed(0)) for param in params]
    for _ in range(POWER_ITERATIONS):
        length = get_total_norm(vector)
        vector = [part / length for part in vector]
        before, vector = vector, product(vector)
    value = sum((one * other).sum() for one, other in zip(before, vector, strict=True))
    return value.item(), parameters_to_vector(before)


@torch.no_grad()
def rises(model: Net, batch: dict[str, Tensor], direction: Tensor, distances: Tensor) -> list[float]:
    """f(x + r v) - f(x) for every distance r, v the direction ``(d,)``; the model's weights are x afterwards."""
    weights, found = parameters_to_vector(model.parameters()), []
    for distance in (0.0, *distances.tolist()):
        vector_to_parameters(weights + distance * direction, model.parameters())
        found.append(model(**batch)["loss"].item())
    vector_to_parameters(weights, model.parameters())
    return [loss - found[0] for loss in found[1:]]


def measure(model: Net, train_batch: dict[str, Tensor], test_batch: dict[str, Tensor]) -> dict:
    """What the table and the picture show of a trained net."""
    eigenvalue, sharpest = sharpest_direction(model, train_batch)
    random = torch.randn(RANDOM_DIRECTIONS, len(sharpest), generator=torch.Generator().manual_seed(0))
    random /= random.norm(dim=1, keepdim=True)
    with torch.no_grad():
        loss = model(**train_batch)["loss"].item()
        right = model(**test_batch)["logits"].argmax(dim=1) == test_batch["labels"]
    along = rises(model, train_batch, sharpest, DISTANCES["sharpest"])
    across = [rises(model, train_batch, direction, DISTANCES["random"]) for direction in random]
    return {
        "loss": loss,
        "eigenvalue": eigenvalue,
        "length": parameters_to_vector(model.parameters()).norm().item(),
        "accuracy": right.float().mean().item(),
        "sharpest": along
        if along[-1] >= along[0]
        else along[::-1],  # an eigenvector has no sign: the steeper side right
        "random": np.mean(across, axis=0).tolist(),
    }


def format_table(results: dict[float | None, list[dict]]) -> str:
    """A line per method: the mean over the seeds and, in brackets, the range."""
    columns = {
        "loss": ("training loss", ".3f", 1),
        "eigenvalue": ("largest eigenvalue", ".2f", 1),
        "length": ("norm of weights", ".1f", 1),
        "accuracy": ("test accuracy, %", ".1f", 100),
    }
    lines = [f"{'':<16}" + "".join(f"{name:>24}" for name, _, _ in columns.values())]
    for radius, runs in results.items():
        cells = []
        for key, (_, form, scale) in columns.items():
            values = [scale * run[key] for run in runs]
            cells.append(f"{mean(values):{form}} ({min(values):{form}} - {max(values):{form}})")
        lines.append(f"{RADII[radius][0]:<16}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def draw(results: dict[float | None, list[dict]], path: Path) -> None:
    """A panel for each kind of direction: a thin line for each seed, a thick one for the mean."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
    for axes, (key, distances) in zip(panels, DISTANCES.items(), strict=True):
        for radius, runs in results.items():
            name, color = RADII[radius]
            for run in runs:
                axes.plot(distances, run[key], color=color, linewidth=0.7, alpha=0.6)
            axes.plot(distances, np.mean([run[key] for run in runs], axis=0), color=color, linewidth=2.2, label=name)
        axes.set(title=TITLES[key], xlabel="distance r from the trained weights", ylim=(0, None))
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("rise of the training loss")
    panels[0].legend(frameon=False, loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[float | None, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per method, from as many first weights (default 3)")
    parser.add_argument("--epochs", type=float, default=20, help="epochs of 20 steps (default 20)")
    parser.add_argument("--output_dir", type=Path, default=Path("out/sharpness"), help="folder of sharpness.png")
    args = parser.parse_args(argv)
    for name in ("seeds", "epochs"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} expects a number above 0, got {getattr(args, name)}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    train_batch, test_batch = load()
    results: dict[float | None, list[dict]] = {radius: [] for radius in RADII}
    for seed in range(args.seeds):
        for radius, runs in results.items():
            runs.append(measure(train(radius, seed, args.epochs, train_batch), train_batch, test_batch))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(results, args.output_dir / "sharpness.png")
    print(f"{format_table(results)}\n\nPicture: {args.output_dir / 'sharpness.png'}")
    return results


if __name__ == "__main__":
    main()
