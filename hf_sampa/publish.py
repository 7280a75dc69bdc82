"""Sharing a run: a card with every checkpoint, and pushes that may fail without ending the training."""

from __future__ import annotations

import inspect
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainerCallback
from transformers.modelcard import TrainingSummary

from . import model_card


logger = get_logger(__name__)


class StepClock(TrainerCallback):
    """Measures how long steps take, from the batch to the update: without evaluation, saving and other callbacks.

    Attributes:
        seconds: of all steps of this call of ``train`` together.
        steps: how many.
    """

    def __init__(self):
        self.seconds, self.steps, self._began = 0.0, 0, 0.0

    @property
    def mean(self) -> float | None:
        """Seconds per step; None before the first."""
        return self.seconds / self.steps if self.steps else None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds, self.steps = 0.0, 0

    def start_step(self) -> None:
        """Called where a step begins, after all callbacks."""
        self._began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._began
        self.steps += 1


class PublishMixin:
    """The part of `SAMPaMixin` that writes model cards and talks to the Hub.

    Attributes:
        card_facts: what `create_model_card` is to be told whenever a card is written, by its arguments' names: ``dataset``,
            ``dataset_tags``, ``dataset_args``, ``tasks``, ``language``, ``license``, ``finetuned_from`` and so on, and
            ``dataset_split``, that of the evaluation data.
    """

    card_facts: dict[str, Any]
    _clock: StepClock
    _card_data: ModelCardData | None = None  # what upstream found out; part of it by asking the Hub

    def create_model_card(self, *args, **kwargs):
        """As in Trainer, with a text of our own; a card that somebody wrote or changed is left alone."""
        given = {**self.card_facts, **dict(zip(CARD_ARGUMENTS, args, strict=False)), **kwargs}
        file = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and model_card.is_somebodys(file):
            logger.warning(
                f"{file} is left as it is, since somebody wrote or changed it. Remove it to have it written anew."
            )
            return
        if not hasattr(self.model, "config"):
            self._card_data = ModelCardData()  # upstream knows of configurations only
        else:
            super().create_model_card(**{name: given[name] for name in CARD_ARGUMENTS if name in given})
            if self.is_world_process_zero():
                self._card_data = ModelCard.load(file).data
        if self.is_world_process_zero():
            model_card.write(file, self, self._card_data, given, self._clock.mean)

    def _save(self, output_dir=None, state_dict=None):
        card = Path(output_dir or self.args.output_dir) / "README.md"
        before = card.read_bytes() if card.exists() else None
        super()._save(output_dir, state_dict)
        if before is not None:
            card.write_bytes(before)  # peft adds to any card that it finds

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            card = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / "README.md"
            if self._card_data is None and hasattr(self.model, "config"):
                known = {name: fact for name, fact in self.card_facts.items() if name in CARD_ARGUMENTS}
                summary = TrainingSummary.from_trainer(self, **known)
                self._card_data = ModelCardData(**summary.create_metadata())
            elif self._card_data is None:
                self._card_data = ModelCardData()
            if not model_card.is_somebodys(card):
                model_card.write(card, self, self._card_data, self.card_facts, self._clock.mean)
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero():
            return super()._push_from_checkpoint(checkpoint_folder)
        running = self.push_in_progress
        before = list(running.jobs) if running else []
        card = Path(self.args.output_dir) / "README.md"
        if (running is None or running.is_done()) and not model_card.is_somebodys(card):
            shutil.copy(Path(checkpoint_folder) / "README.md", card)
        super()._push_from_checkpoint(checkpoint_folder)
        for job in self.push_in_progress.jobs if self.push_in_progress else []:
            if job not in before:
                job.add_done_callback(_report)


CARD_ARGUMENTS = list(inspect.signature(Trainer.create_model_card).parameters)[1:]


def _report(job: Future) -> None:
    """Say what became of a push; nobody else looks at it."""
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error(
            f"A push to the Hub failed: {type(error).__name__}: {error}. The checkpoint is where it was saved, the training goes "
            "on, and the next save pushes again.",
            main_process_only=False,
        )
