"""Sharing a run: a card with every checkpoint, and pushes that may fail without ending the training."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from huggingface_hub import ModelCardData
from transformers.modelcard import TrainingSummary

from ..files import in_place_of, partial_of
from . import model_card
from .card_facts import CardFacts
from .evaluations import Evaluation, record
from .signature import BY_SOMEBODY, is_cut, is_ours, text_of, why_left_alone


if TYPE_CHECKING:
    from ..trainer import SAMPaMixin

logger = get_logger(__name__)


class Card:
    """The model card of a trainer, and what it says that is found nowhere else.

    Args:
        trainer: whose model it is of.

    Attributes:
        facts: what a run cannot know; told by the user.
        evaluations: results, with the weights and the data that they are of.
        best_step: the step of the best weights, where they were loaded at the end.
    """

    def __init__(self, trainer: SAMPaMixin):
        self.trainer, self.facts = trainer, CardFacts()
        self.evaluations: list[Evaluation] = []
        self.best_step: int | None = None
        # What upstream made of facts; part of it by asking the Hub.
        self._known: tuple[CardFacts, ModelCardData] | None = None

    def begin(self) -> None:
        """A run begins: what was measured before is of other weights."""
        self.evaluations, self.best_step = [], None

    def note_best(self) -> None:
        """The best weights were loaded."""
        state = self.trainer.state
        if Path(state.best_model_checkpoint).is_dir():
            self.best_step = state.best_global_step

    @contextmanager
    def evaluating(self, given: dict[str, Any]) -> Iterator[None]:
        """Around an evaluation, whose results are kept; `given` are the arguments of ``evaluate``."""
        history = self.trainer.state.log_history
        before = len(history)
        yield
        dataset, prefix = given.get("eval_dataset"), given.get("metric_key_prefix", "eval")
        if found := record(self.trainer, self.trainer.state.log_history[before:], dataset, prefix):
            self.evaluations.append(found)

    # ---- Writing ----

    def create(self, told: dict[str, Any]) -> None:
        """Write it into the output folder; `told` is what ``create_model_card`` was told besides `facts`."""
        trainer = self.trainer
        facts = replace(self.facts, **{name: fact for name, fact in told.items() if fact is not None})
        file = Path(trainer.args.output_dir) / "README.md"
        if why := why_left_alone(file):
            logger.warning(_left_alone(file, why))
        elif self._is_published_later(file):
            logger.warning(f"{file} is left as it is, since it is of the run that made this model.")
            model_card.lead_to(file, trainer.hub_model_id)
        else:
            self._write(file, facts, trainer.hub_model_id)

    def _is_published_later(self, file: Path) -> bool:
        """Whether `file` is the card of a run, and this trainer has trained nothing but loaded that run's model."""
        base = getattr(getattr(self.trainer.model, "config", None), "_name_or_path", None)
        own = bool(base) and file.parent.resolve() in (Path(base).resolve(), *Path(base).resolve().parents)
        return self.trainer.state.global_step == 0 and own and model_card.is_of_a_run(file)

    def _write(self, file: Path, facts: CardFacts, repository: str | None = None) -> None:
        _keep_what_is_cut(file)
        if self._known is None or self._known[0] != facts:
            data = ModelCardData()
            if hasattr(self.trainer.model, "config"):
                summary = TrainingSummary.from_trainer(self.trainer, **facts.for_trainer())
                data = ModelCardData(**summary.create_metadata())
            self._known = copy.deepcopy(facts), data
        seconds = self.trainer.seconds_per_step
        model_card.write(file, self.trainer, copy.deepcopy(self._known[1]), facts, repository, seconds)

    def _try_to_write(self, file: Path, repository: str | None = None) -> None:
        """Write it during the training, which it does not end if it cannot be written; not over somebody's."""
        try:
            if (why := why_left_alone(file)) is None:
                self._write(file, self.facts, repository)
            elif why != BY_SOMEBODY:
                logger.warning(_left_alone(file, why))
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # of what people told or measured
            logger.warning(f"There is no new card in {file.parent}: {type(error).__name__}: {error}")

    def begin_checkpoint(self, folder: Path, old: Path | None) -> None:
        """Before a checkpoint is written into `folder`, in the place of one that is in `old` meanwhile."""
        card, before = folder / "README.md", None if old is None else old / "README.md"
        if before is not None:
            partial_of(before).unlink(missing_ok=True)
            if before.is_dir():
                return  # moved into `folder` with what else is somebody's
            if before.exists() and not is_ours(text_of(before)):
                folder.mkdir(parents=True, exist_ok=True)
                with in_place_of(card) as partial:
                    shutil.copy(before, partial)
        if self.trainer.args.should_save:
            self._try_to_write(card)

    @contextmanager
    def kept(self, output_dir: str | None) -> Iterator[None]:
        """Around the writing of a model into `output_dir`: a card that is there stays as it is."""
        args = self.trainer.args
        card = Path(output_dir or args.output_dir) / "README.md"
        # Trainer calls this on all processes, of which one writes.
        before = card.read_bytes() if args.should_save and card.is_file() else None
        try:
            yield
        finally:
            if before is not None and (not card.exists() or card.read_bytes() != before):
                with in_place_of(card) as partial:
                    partial.write_bytes(before)  # peft adds to any card that it finds

    # ---- Pushing ----

    def push(self, push: Callable[[], None]) -> None:
        """Trainer's `push` of a checkpoint, with a card of the whole run, and with a word if it fails."""
        trainer = self.trainer
        running = trainer.push_in_progress
        before = list(running.jobs) if running else []
        card = Path(trainer.args.output_dir) / "README.md"
        if running is None or running.is_done():
            self._try_to_write(card, trainer.hub_model_id)
        push()
        for job in trainer.push_in_progress.jobs if trainer.push_in_progress else []:
            if job not in before:
                job.add_done_callback(_report)


def _left_alone(file: Path, why: str) -> str:
    return f"{file} is left as it is, since {why}. Remove it to have it written anew."


def _keep_what_is_cut(file: Path) -> None:
    """Out of the way of a new card: its last line may be a person's."""
    if file.exists() and is_cut(text := text_of(file)) and text.strip("\0\n "):
        kept = file.with_name(f"_{file.name}.cut")
        logger.warning(f"{file} was cut, and is written anew. What there was of it is in {kept.name}.")
        os.replace(file, kept)


def _report(job: Future) -> None:
    """Say what became of a push; nobody else looks at it."""
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error(
            f"A push to the Hub failed: {type(error).__name__}: {error}. The checkpoint is where it was saved; the next save, or "
            "push_to_hub(), pushes again.",
            main_process_only=False,
        )
