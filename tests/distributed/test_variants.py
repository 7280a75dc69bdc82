"""P2, P3, P5, P7, P8 for every variant in every timing that it supports, with dropout, accumulation and a ragged batch."""

from __future__ import annotations

import io
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_sampa import SAMPaTrainer
from hf_sampa.variants import VARIANTS
from hf_sampa.variants.parts import Direction
from hf_sampa.variants.recipe import Recipe
from tests import tiny
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

CASES = [(name, method) for name, variant in VARIANTS.items() for method in variant.timings]
CASES.append(("bisam own", "sampa"))  # with a second gradient of B_{t+1}
PAIRED = [case for case in CASES if case[1] == "sampa"]
# So that a short run comes to what is to be tested.
ARGUMENTS = {
    "ssam_d": {"every": 2},
    "looksam": {"k": 2},
    "vsam": {"window": 5, "start": 2.0, "warmup": 0.0},
    "arsam": {"sampler": "bernoulli"},
    "ksam": {"k": 3},
    "msam": {"size": 2},
    "saf": {"epochs": 1, "start": 0.0},
    "mesa": {"start": 0.0, "decay": 0.9},
    "ausam": {"growth": 0.1},
    "bisam own": {"mix": "own"},
    "ssam_f": {"every": 3, "fisher_samples": 2},
    "bi_lora": {"rank": 2},
}
RESUMED_AT = 5
STEPS = 8  # of two micro-batches of 4, in epochs of 19 samples: the last of an epoch is one of 3 samples


class Small(nn.Module):
    """As little as has what variants ask for: matrices, a normalization, dropout."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


ADAPTED = {name for name, variant in VARIANTS.items() if variant.for_adapters}


def small(name, dropout: float = 0.1) -> nn.Module:
    """A model that the variant goes with."""
    model = Small(dropout)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["body.1", "body.5"])) if name in ADAPTED else model


def settings(name, method) -> dict:
    return {
        "variant": name.partition(" ")[0],
        "variant_args": ARGUMENTS.get(name, {}),
        "method": method,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": RESUMED_AT,
    }


def train(folder, cases, resume=None) -> dict:
    return {
        case: tiny.run(
            folder / "-".join(case),
            partial(small, case[0]),
            tiny.images(19),
            resume=resume and str(resume / "-".join(case) / f"checkpoint-{RESUMED_AT}"),
            **settings(*case),
        )
        for case in cases
    }


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """Every case on one process, and the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("serial")
    yield train(folder, CASES), folder
    shutil.rmtree(folder)


def differences(found: dict, expected: dict) -> list[str]:
    return [
        f"{case}: {difference}"
        for case, outcome in found.items()
        for difference in tiny.differing(tiny.comparable(outcome), tiny.comparable(expected[case]))[:2]
    ]


def test_two_processes_are_one(serial, tmp_path):
    """P2 and P3 of those that have SAMPa's timing."""
    expected, _ = serial
    for found in run_ranks(train, 2, tmp_path / "out", PAIRED, folder=tmp_path):
        assert differences(found, expected) == []


def test_resumed_is_never_stopped(serial, tmp_path):
    """P5 of all."""
    expected, written = serial
    assert differences(train(tmp_path, CASES, resume=written), expected) == []


CARRIED = [("msam", "sampa"), ("functional_sam", "sampa"), ("bisam own", "sampa")]  # besides g_t


def test_two_pairs_resumed_are_never_stopped(tmp_path):
    """Each pair has gradients, or slopes, of its own part of the batch."""
    whole = run_ranks(train, 4, tmp_path / "whole", CARRIED, folder=tmp_path / "first")
    resumed = run_ranks(train, 4, tmp_path / "again", CARRIED, tmp_path / "whole", folder=tmp_path / "second")
    for found, expected in zip(resumed, whole, strict=True):
        assert differences(found, expected) == []


def as_earlier_versions_wrote(file) -> None:
    """With what one replica carries."""
    tensors = load_file(file)
    kept = {name.replace("@0.", "@"): each for name, each in tensors.items() if "@" not in name or "@0." in name}
    assert kept.keys() != tensors.keys()
    save_file(kept, file)


def go_on(folder, checkpoint) -> tuple[dict, str]:
    """And what was logged."""
    lines, logger = io.StringIO(), logging.getLogger("hf_sampa")
    handler = logging.StreamHandler(lines)
    logger.addHandler(handler)
    chosen = {**settings("msam", "sampa"), "ignore_changed_files": True, "save_strategy": "no"}
    found = tiny.run(folder, Small, tiny.images(19), resume=str(checkpoint), **chosen)
    logger.removeHandler(handler)
    return found, lines.getvalue()


def test_a_checkpoint_with_what_one_replica_carries(tmp_path):
    """Of earlier versions: one replica goes on exactly; several are told, and take g_t anew."""
    written = Path("msam-sampa", f"checkpoint-{RESUMED_AT}")
    expected = train(tmp_path / "one", CARRIED[:1])
    as_earlier_versions_wrote(tmp_path / "one" / written / "sampa.safetensors")
    found, said = go_on(tmp_path / "out", tmp_path / "one" / written)
    assert differences({CARRIED[0]: found}, expected) == [] and "for one replica alone" not in said
    run_ranks(train, 4, tmp_path / "two", CARRIED[:1], folder=tmp_path / "first")
    as_earlier_versions_wrote(tmp_path / "two" / written / "sampa.safetensors")
    for _, said in run_ranks(go_on, 4, tmp_path / "out", tmp_path / "two" / written, folder=tmp_path / "second"):
        assert "for one replica alone, as earlier versions wrote it: g_t is computed anew" in said


class Following(Direction):
    """Perturbs along a mean of g_t and the g~ of the step before, which it sees only where it was called."""

    state = ("v", "last")

    def __init__(self):
        self.v = self.last = None

    def __call__(self, g, x, norm, now):
        self.v = [each.clone() for each in g]
        for each, last in zip(g, self.last or [], strict=self.last is not None):
            each.add_(last)
        return sum(each.square().sum() for each in g).sqrt()

    def observe(self, g_tilde):
        self.last = [each - own for each, own in zip(g_tilde, self.v, strict=True)]


def train_following(folder) -> dict:
    recipe = {"recipe": Recipe(direction=Following())}
    return tiny.run(folder, Small, tiny.images(19), trainer_kwargs=recipe, max_steps=STEPS)


def test_a_direction_of_ones_own_observes_where_it_was_called(tmp_path):
    expected = tiny.comparable(train_following(tmp_path / "one"))
    for found in run_ranks(train_following, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(tiny.comparable(found), expected) == []


class Interrupted(Exception):
    pass


class FailsOnce(SAMPaTrainer):
    """Raises in a given pass of a run, before its backward is through."""

    at: int

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = tiny.Passes()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self._in_pass and self.passes() == self.at:
            raise Interrupted
        return loss


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_model_holds_x_t_after_an_exception(tmp_path, case):
    """P7, and P8: what callbacks see after every step is where the next step starts."""
    for at in (2, 7):
        recorder = tiny.Recorder()
        trainer = FailsOnce(
            model=small(case[0]),
            args=tiny.arguments(tmp_path, **{**settings(*case), "save_strategy": "no"}),
            train_dataset=tiny.images(19),
            callbacks=[recorder],
        )
        trainer.at = at
        with pytest.raises(Interrupted):
            trainer.train()
        expected = recorder.weights[-1] if recorder.weights else list(small(case[0]).parameters())
        assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), expected, strict=True))
