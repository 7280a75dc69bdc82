"""Everything that a rank may need, imported, and what is looked up once per process looked up: what ranks are forked from.

Nothing here computes or starts a thread, which no fork would survive.
"""

from __future__ import annotations

import gc
import os


# Ranks ask no network; `hub.point_to` leads those that are to talk to a hub of the tests.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import TrainerControl, TrainerState
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.state import Collected
from tests import models, ranks, tiny  # noqa: F401
from tests.ecosystem import detection_cases, sentence_transformers_cases, trl_cases  # noqa: F401


def read_sources() -> None:
    """A run reads in the sources of Trainer's classes which attributes are theirs, which takes a second."""
    trainer = SAMPaTrainer.__new__(SAMPaTrainer)
    trainer.args = SAMPaTrainingArguments.__new__(SAMPaTrainingArguments)
    trainer.state, trainer.control = TrainerState(), TrainerControl()
    Collected(trainer, ("transformers.", "hf_sampa."), exchange=None)


read_sources()
get_checkpoint_conversion_mapping("bert")  # the first time it compiles a thousand patterns, for every model there is
# A run begins with a collection, which takes half a second where it looks at all that was imported.
gc.collect()
gc.freeze()
