"""What is said of a run that is published: the model card, its facts, figures and citations, and the push to the Hub.

Knows nothing of the algorithm.
"""

from .card_facts import CardFacts, computation
from .evaluations import Evaluation, bound, plain
from .publish import Card
from .started import versions


__all__ = ["Card", "CardFacts", "Evaluation", "bound", "computation", "plain", "versions"]
