"""The progress bar of a run, with both losses and the sharpness of the last step."""

from __future__ import annotations

from transformers import ProgressCallback, Trainer

from .passes import StepReport


class SAMPaProgressCallback(ProgressCallback):
    """`ProgressCallback` whose training bar shows what the last step saw.

    Attributes:
        report: of the last step; None before the first.
    """

    report: StepReport | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.report is not None:
            shown = {
                "loss": self.report.loss,
                "perturbed": self.report.perturbed_loss,
                "sharpness": self.report.sharpness,
            }
            # What a step does not have is NaN.
            shown = {name: f"{value:.4g}" for name, value in shown.items() if value == value}
            self.training_bar.set_postfix(shown, refresh=False)
        super().on_step_end(args, state, control, **kwargs)


def replace_progress_bar(trainer: Trainer) -> SAMPaProgressCallback | None:
    """Put SAMPa's bar where `trainer` has transformers' own; None, and nothing changes, where it has another or none."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback) is ProgressCallback:
            bar = SAMPaProgressCallback(callback.max_str_len)
            trainer.remove_callback(callback)
            trainer.add_callback(bar)
            return bar
    return None
