"""Sharing a run: a card with every checkpoint, and pushes that may fail without ending the training."""

from __future__ import annotations

import copy
import inspect
import shutil
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import ModelCardData
from transformers.modelcard import TrainingSummary

from . import model_card
from .card_facts import CardFacts
from .evaluations import Evaluation, record


logger = get_logger(__name__)


class StepClock:
    """Measures how long steps take, from the batch to the update: without evaluation, saving and callbacks.

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

    def start(self) -> None:
        """A step begins, after all callbacks."""
        self._began = time.perf_counter()

    def stop(self, *_) -> None:
        """The base optimizer's step is over; takes what its hooks are given."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1


class PublishMixin:
    """The part of `SAMPaMixin` that evaluates for, and writes, model cards, and talks to the Hub.

    Attributes:
        card_facts: what cards are to say that a run cannot know; set its attributes.
        continued: sentences on parts of the run that were of other settings, or of plain Trainer.
        weights_step: the step whose weights the model holds: the last, or the best where that was loaded at the end.
    """

    _card_facts: CardFacts
    continued: list[str]
    _clock: StepClock
    _evaluations: list[Evaluation]
    _best_step: int | None = None
    _known: tuple[CardFacts, ModelCardData] | None = None  # what upstream made of facts; part of it by asking the Hub

    @property
    def card_facts(self) -> CardFacts:
        return self._card_facts

    @card_facts.setter
    def card_facts(self, facts: CardFacts | dict[str, str | list[str]]) -> None:
        self._card_facts = CardFacts(**facts) if isinstance(facts, dict) else facts

    @property
    def weights_step(self) -> int:
        return self.state.global_step if self._best_step is None else self._best_step

    def _prepare_for_training(self, *args, **kwargs):
        self._evaluations, self._best_step, self.continued = [], None, []
        return super()._prepare_for_training(*args, **kwargs)

    def _load_best_model(self):
        super()._load_best_model()
        if Path(self.state.best_model_checkpoint).is_dir():
            self._best_step = self.state.best_global_step

    def evaluate(self, *args, **kwargs):
        before = len(self.state.log_history)
        metrics = super().evaluate(*args, **kwargs)
        given = inspect.signature(super().evaluate).bind(*args, **kwargs).arguments
        dataset, prefix = given.get("eval_dataset"), given.get("metric_key_prefix", "eval")
        if found := record(self, self.state.log_history[before:], dataset, prefix):
            self._evaluations.append(found)
        return metrics

    def create_model_card(self, *args, **kwargs):
        """As in Trainer, with a text of our own; what is not said here is taken from `card_facts`.

        A card that somebody wrote or changed is left alone, with a warning.
        """
        told = dict(zip(inspect.signature(super().create_model_card).parameters, args, strict=False)) | kwargs
        facts = replace(self.card_facts, **{name: fact for name, fact in told.items() if fact is not None})
        if not self.is_world_process_zero():
            return
        file = Path(self.args.output_dir) / "README.md"
        if model_card.is_somebodys(file):
            logger.warning(
                f"{file} is left as it is, since somebody wrote or changed it. Remove it to have it written anew."
            )
        elif self._is_published_later(file):
            logger.warning(f"{file} is left as it is, since it is of the run that made this model.")
            model_card.lead_to(file, self.hub_model_id)
        else:
            # Not by way of super(), whose text is not ours, and which takes over tags of the card that is there.
            self._write_card(file, facts, self.hub_model_id)

    def _is_published_later(self, file: Path) -> bool:
        """Whether `file` is the card of a run, and this trainer has trained nothing but loaded that run's model."""
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        own = bool(base) and file.parent.resolve() in (Path(base).resolve(), *Path(base).resolve().parents)
        return self.sampa is None and own and model_card.is_of_a_run(file)

    def _write_card(self, file: Path, facts: CardFacts, repository: str | None = None) -> None:
        if self._known is None or self._known[0] != facts:
            data = ModelCardData()
            if hasattr(self.model, "config"):
                data = ModelCardData(**TrainingSummary.from_trainer(self, **facts.for_trainer()).create_metadata())
            self._known = copy.deepcopy(facts), data
        model_card.write(file, self, copy.deepcopy(self._known[1]), facts, repository, self._clock.mean)

    def _save(self, output_dir=None, state_dict=None):
        card = Path(output_dir or self.args.output_dir) / "README.md"
        # Trainer calls this on all processes, of which one writes.
        before = card.read_bytes() if self.args.should_save and card.exists() else None
        super()._save(output_dir, state_dict)
        if before is not None:
            card.write_bytes(before)  # peft adds to any card that it finds

    def _begin_checkpoint(self, folder: Path, old: Path | None) -> None:
        super()._begin_checkpoint(folder, old)
        if old is not None and model_card.is_somebodys(old / "README.md"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(old / "README.md", folder)
        if self.args.should_save:
            self._try_to_write_card(folder / "README.md")

    def _try_to_write_card(self, file: Path, repository: str | None = None) -> None:
        """Write a card during the training, which it does not end if it cannot be written; not over somebody's."""
        try:
            if not model_card.is_somebodys(file):
                self._write_card(file, self.card_facts, repository)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # of what people told or measured
            logger.warning(f"There is no card in {file.parent}: {type(error).__name__}: {error}")

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero():
            return super()._push_from_checkpoint(checkpoint_folder)
        running = self.push_in_progress
        before = list(running.jobs) if running else []
        card = Path(self.args.output_dir) / "README.md"
        if running is None or running.is_done():
            self._try_to_write_card(card, self.hub_model_id)
        super()._push_from_checkpoint(checkpoint_folder)
        for job in self.push_in_progress.jobs if self.push_in_progress else []:
            if job not in before:
                job.add_done_callback(_report)


def _report(job: Future) -> None:
    """Say what became of a push; nobody else looks at it."""
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error(
            f"A push to the Hub failed: {type(error).__name__}: {error}. The checkpoint is where it was saved; the next save, or "
            "push_to_hub(), pushes again.",
            main_process_only=False,
        )
