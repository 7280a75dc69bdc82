"""Plain AdamW, to compare with: `Trainer` with SAMPa's card and evaluation loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import Trainer

from ..cards import WithCard
from ..checkpoints import inspect, last_whole, load_missing, load_weights, steps_in
from ..compat import let_trainer_divide
from ..data import prepare_and_remember
from ..distributed import whole
from ..evaluation import ExactEvalLoss
from ..monitoring import WithDiagnostics
from ..state import Collected


logger = get_logger(__name__)


class BaselineTrainer(ExactEvalLoss, WithCard, WithDiagnostics, Trainer):
    """For ``--method adamw``: `Trainer`, whose `eval_loss` is the same on every number of processes, its card true, its
    weights whole after a checkpoint was loaded, and its sharpness measured as SAMPa's is."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # What cards ask a trainer for; all that SAMPa's do besides, this one does not.
        self.continued: list[str] = []
        self.seconds_per_step = self._recipe = None
        self._add_diagnostics()

    def create_accelerator_and_postprocess(self) -> None:
        """Upstream's lets accelerate divide losses once more, before transformers 5.5.4, and does not know a loader of all the data."""
        super().create_accelerator_and_postprocess()
        let_trainer_divide(self)
        accelerator = self.accelerator
        accelerator.prepare_data_loader = partial(prepare_and_remember, accelerator.prepare_data_loader)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Upstream's takes the last checkpoint, though a process was killed while it wrote it."""
        if resume_from_checkpoint is True:
            output_dir = Path(self.args.output_dir)
            folder, problems = last_whole(output_dir, steps_in(output_dir), inspect)
            for problem in problems:
                logger.warning(f"Passing over a checkpoint. {problem}")
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint, **kwargs)

    def unlogged_means(self) -> dict[str, float]:
        """As in `SAMPaMixin`: none."""
        return {}

    def lookahead_error(self) -> None:
        """As in `SAMPaMixin`: none."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """As in `SAMPaMixin`: what the block leaves on the trainer, and in numbers of modules, is undone."""
        with Collected(self, ("transformers.", "hf_sampa."), exchange=None).aside():
            yield

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Of a sharded model upstream's is spread, and torch 2.9 would log what this process has of it."""
        return whole(super()._get_grad_norm(*args, **kwargs))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Upstream would take a step before it asks whether there is to be one: of a run that has ended, resumed, there is not."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """As in `SAMPaMixin`; a checkpoint that cannot be written ends the run here, as upstream's does."""
        write()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Upstream's says of another model's weights every name that does not fit."""
        self._loading_from = resume_from_checkpoint
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, *args, **kwargs)
        load_weights(self.model, resume_from_checkpoint, load)

    def _load_best_model(self) -> None:
        self._loading_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Upstream only warns of tensors that it did not load, as most of a ViT's on 5.23: here they are loaded."""
        load_missing(self.model, self._loading_from, load_result)
        super()._issue_warnings_after_load(load_result)
