"""The progress bar of a run, with both losses and the sharpness of the last step."""

from __future__ import annotations

from transformers import ProgressCallback, Trainer, TrainerCallback

from .passes import StepReport


class ShowsReport(TrainerCallback):
    """Mixin of progress bars.

    Attributes:
        report: of the last step; None before the first.
    """

    report: StepReport | None = None

    def shown(self) -> dict[str, str]:
        """What the bar is to show; what a step does not have is NaN, and left out."""
        if self.report is None:
            return {}
        numbers = {
            "loss": self.report.loss,
            "perturbed": self.report.perturbed_loss,
            "sharpness": self.report.sharpness,
        }
        return {name: f"{value:.4g}" for name, value in numbers.items() if value == value}


class SAMPaProgressCallback(ShowsReport, ProgressCallback):
    """`ProgressCallback` whose training bar shows what the last step saw."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar.set_postfix(self.shown(), refresh=False)
        super().on_step_end(args, state, control, **kwargs)


def _notebook_callback() -> ShowsReport:
    # Needs IPython, which whoever has the bar that this one replaces has.
    from transformers.utils.notebook import NotebookProgressCallback

    class SAMPaNotebookProgressCallback(ShowsReport, NotebookProgressCallback):
        """`NotebookProgressCallback` whose training bar shows what the last step saw."""

        def on_step_end(self, args, state, control, **kwargs):
            self.training_tracker.prefix = ", ".join(f"{name} {value}" for name, value in self.shown().items())
            super().on_step_end(args, state, control, **kwargs)

    return SAMPaNotebookProgressCallback()


def replace_progress_bar(trainer: Trainer) -> ShowsReport | None:
    """Put SAMPa's bar where `trainer` has transformers' own; None, and nothing changes, where it has another or none."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback) is ProgressCallback:
            bar: ShowsReport = SAMPaProgressCallback(callback.max_str_len)
        elif type(callback).__name__ == "NotebookProgressCallback":
            bar = _notebook_callback()
        else:
            continue
        trainer.remove_callback(callback)
        trainer.add_callback(bar)
        return bar
    return None
