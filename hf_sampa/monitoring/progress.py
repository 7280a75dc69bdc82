"""The progress bar of a run, with both losses and the sharpness of the last step."""

from __future__ import annotations

from transformers import ProgressCallback, Trainer

from ..engine import StepReport


def show(trainer: Trainer, report: StepReport) -> None:
    """Write what a step saw onto transformers' bar, where `trainer` has one; what the step does not have is left out."""
    numbers = {"loss": report.loss, "perturbed": report.perturbed_loss, "sharpness": report.sharpness}
    shown = {name: f"{value:.4g}" for name, value in numbers.items() if value == value}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.set_postfix(shown, refresh=False)
        elif type(callback).__name__ == "NotebookProgressCallback" and callback.training_tracker is not None:
            callback.training_tracker.prefix = ", ".join(f"{name} {value}" for name, value in shown.items())
