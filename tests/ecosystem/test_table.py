"""The page of what was tried, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import trl
from datasets import Dataset

from hf_sampa import SAMPaArgumentsMixin, SAMPaMixin
from tests.ecosystem import models, table
from tests.ecosystem.refused_cases import REFUSED
from tests.ecosystem.runs import SETTINGS
from tests.ecosystem.trl_cases import load_language_model
from tests.models import CHECKPOINTING


def test_the_page_says_what_the_tests_prove():
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "write it with python -m tests.ecosystem.table"


def reward(completions, **columns):
    return [0.0] * len(completions)


@pytest.mark.parametrize("name", REFUSED)
def test_trainers_that_generate_are_refused(name, start, tmp_path, monkeypatch):
    """By name and with the reason, before they have done anything."""
    monkeypatch.setenv("CI", "true")
    below, config = getattr(trl, name), getattr(trl, name.replace("Trainer", "Config"))

    @dataclass
    class Arguments(SAMPaArgumentsMixin, config): ...

    class Mine(SAMPaMixin, below): ...

    model = load_language_model(models.path(start, "llama", dropout=False))
    distils = name == "DistillationTrainer"
    own = {"teacher_model": model} if distils else {"reward_funcs": reward}
    settings = {**SETTINGS, "bf16": False, CHECKPOINTING: False}
    args = Arguments(str(tmp_path), **settings, **({} if distils else {"num_generations": 2}))
    data = Dataset.from_dict({"prompt": models.texts(8, 4)})
    with pytest.raises(ValueError, match=rf"(?s){name}.*generat"):
        Mine(model=model, args=args, train_dataset=data, processing_class=models.tokenizer(), **own)
