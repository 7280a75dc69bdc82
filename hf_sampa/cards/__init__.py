"""What is said of a run that is published: the model card, its facts, figures and citations, and the push to the Hub.

Knows nothing of the algorithm.
"""

from .arguments_file import texts_in, without_secrets
from .card_facts import CardFacts, changes, computation
from .evaluations import Evaluation, bound, plain
from .harmless import masked
from .of_trainer import WithCard
from .signature import why_left_alone
from .started import declare_options, versions


__all__ = [
    "CardFacts",
    "Evaluation",
    "WithCard",
    "bound",
    "changes",
    "computation",
    "declare_options",
    "masked",
    "plain",
    "texts_in",
    "versions",
    "why_left_alone",
    "without_secrets",
]
