"""A picture of the run: loss and metrics by step, from the trainer's log."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger


logger = get_logger(__name__)

FILE = "learning_curve.png"
TRAINING = "training"
# What an evaluation logs that is no score of the model.
COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "samples")


def draw(history: list[dict[str, Any]], folder: Path) -> None:
    """Write `FILE` into `folder`, of the log `history`; says so where matplotlib is missing, and does nothing without a log."""
    losses, metrics = curves(history)
    if not losses:
        return
    if find_spec("matplotlib") is None:
        logger.warning(f"There is no {FILE}, since matplotlib is not installed: pip install matplotlib.")
        return
    # Not at the top of the module, since only who has it needs it; not pyplot, which would choose a display for the process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6 * (1 + bool(metrics))), dpi=120, layout="constrained")
    panels = figure.subplots(1 + bool(metrics), sharex=True, squeeze=False)[:, 0]
    for panel, lines, what in zip(panels, (losses, metrics), ("loss (mean per sample)", "metric"), strict=False):
        of_evaluations = count(1)
        for name, points in lines.items():
            # Whichever was logged first, and whether or not the other was.
            color = "C0" if name == TRAINING else f"C{next(of_evaluations)}"
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=4, label=name, color=color)
        panel.set_ylabel(what)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[-1].set_xlabel("step (updates of the weights)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(folder / FILE)


def curves(history: list[dict[str, Any]]) -> tuple[dict[str, list], dict[str, list]]:
    """Losses, and metrics, of the log: the points ``(step, value)`` of each by its name for the legend."""
    losses: dict[str, list] = {}
    metrics: dict[str, list] = {}
    for line in history:
        if "train_runtime" in line:
            continue
        for name, value in line.items():
            own = name.removeprefix("eval_")
            if not isinstance(value, int | float) or (own == name and name != "loss") or own.endswith(COSTS):
                continue
            if name == "loss":
                points = losses.setdefault(TRAINING, [])
            elif own == "loss" or own.endswith("_loss"):
                points = losses.setdefault(f"evaluation {own.removesuffix('loss').rstrip('_')}".rstrip(), [])
            else:
                points = metrics.setdefault(own.replace("_", " "), [])
            points.append((line["step"], value))
    return losses, metrics
