"""A trainer with a card of its own: what it was evaluated on is remembered, and the text is ours."""

from __future__ import annotations

import inspect
from functools import cached_property

from .card_facts import CardFacts
from .publish import Card


class WithCard:
    """Put it above a `Trainer` whose arguments are of a class with `SAMPaArgumentsMixin`."""

    @cached_property
    def _card(self) -> Card:
        return Card(self)

    @property
    def card_facts(self) -> CardFacts:
        """What cards are to say that a run cannot know; set its attributes."""
        return self._card.facts

    @card_facts.setter
    def card_facts(self, facts: CardFacts | dict[str, str | list[str]]) -> None:
        self._card.facts = CardFacts(**facts) if isinstance(facts, dict) else facts

    @property
    def weights_step(self) -> int:
        """The step of the weights that the model holds, which is the last, or the best where that was loaded at the end."""
        best = self._card.best_step
        return self.state.global_step if best is None else best

    def evaluate(self, *args, **kwargs):
        """As in Trainer; the model card needs to know which weights and data the metrics are of."""
        given = inspect.signature(super().evaluate).bind(*args, **kwargs).arguments
        with self._card.evaluating(given):
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        """As in Trainer, with a text of our own; what is not said here is taken from `card_facts`.

        A card that somebody wrote or changed is left alone, with a warning.
        """
        # Not by way of super(), whose text is not ours, and which takes over tags of the card that is there.
        told = dict(zip(inspect.signature(super().create_model_card).parameters, args, strict=False)) | kwargs
        if self.is_world_process_zero():
            self._card.create(told)

    def _load_best_model(self):
        """Upstream's is not known to the card."""
        super()._load_best_model()
        self._card.note_best()
