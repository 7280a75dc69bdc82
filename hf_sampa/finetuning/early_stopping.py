"""Early stopping that a resumed run keeps to: by its own settings, and for good."""

from __future__ import annotations

import transformers
from accelerate.logging import get_logger
from transformers import TrainerControl, TrainerState

from .training_arguments import FineTuningArguments


logger = get_logger(__name__)


# Of upstream's name, by which checkpoints know it.
class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """Upstream's, which says that it has stopped a run, and does so before the first step of one that it has stopped before."""

    before_the_first_step = False

    def on_train_begin(
        self, args: FineTuningArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Upstream makes it anew with the settings of the checkpoint's run, and begins with a step whatever was counted."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience = args.early_stopping_patience
        self.early_stopping_threshold = args.early_stopping_threshold
        self.before_the_first_step = self._has_stopped
        # Another one may have stopped it, too.
        control.should_training_stop |= self._has_stopped

    def on_train_end(
        self, args: FineTuningArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Why there are no more steps, if it is for this."""
        super().on_train_end(args, state, control, **kwargs)
        if not self._has_stopped:
            return
        metric = args.metric_for_best_model.removeprefix("eval_")
        stopped, goes_on = "Stopped", ""
        if self.before_the_first_step:
            stopped = "No further step is trained, since the run was stopped"
            goes_on = " A larger --early_stopping_patience goes on."
        logger.warning(
            f"{stopped} at step {state.global_step}: eval_{metric} was not better for {self.early_stopping_patience_counter} evaluations "
            f"than {state.best_metric:.4g} at step {state.best_global_step}.{goes_on}"
        )

    @property
    def _has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience
