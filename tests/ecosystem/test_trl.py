"""TRL's trainers under the mixin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_sampa import compat
from tests.ecosystem import runs
from tests.ecosystem.properties import *  # noqa: F403
from tests.ecosystem.trl_cases import CASES
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed
NOT_COLLECTED = {
    "perturbed_loss",
    "sharpness",
    "ascent_grad_norm",
    "ascent_cosine",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "plain_steps",
}


def collected(outcome: dict) -> list[dict[str, float]]:
    """What TRL collects in each step; of tokens, which it adds up, how many came with the step."""
    lines = [line for line in outcome["training"] if "loss" in line]
    tokens = [0, *(line["num_tokens"] for line in lines)]
    steps = [{name: value for name, value in line.items() if name not in NOT_COLLECTED} for line in lines]
    return [
        {**step, "num_tokens": after - before} for step, before, after in zip(steps, tokens, tokens[1:], strict=False)
    ]


def test_every_update_batch_is_counted_once(case, one):
    """Without perturbation, look-ahead and dropout: all that TRL collects, of one of the two passes and not of both.

    That of B_t sees what plain TRL sees at the same step, that of B_{t+1} what it sees at the next, but for roundings
    of the look-ahead. Where batches are of one size, tokens are counted as plain TRL counts them.
    """
    plain, found = collected(one["plain"]), collected(one["flat"])
    assert len(plain) == len(found) == runs.STEPS and len(plain[0]) > 2
    if start := case.settings.get("sampa_start"):
        # Until then a batch is its first half: here of pairs and sentences of one length.
        assert [step["num_tokens"] for step in found[:start]] == [step["num_tokens"] / 2 for step in plain[:start]]
        return
    ahead = [pytest.approx(step, rel=1e-3, abs=1e-5) for step in plain[1:]]
    assert found == [pytest.approx(step, rel=1e-3, abs=1e-5) for step in plain] or found[:-1] == ahead
    if len({step["num_tokens"] for step in plain}) == 1:
        assert [step["num_tokens"] for step in found] == [step["num_tokens"] for step in plain]


def accumulated(case, start, folder) -> list[dict]:
    """Weights of TRL's own trainer, and of it under the mixin without perturbation and look-ahead."""
    settings = {"dropout": False, "samples": 16, "gradient_accumulation_steps": 2, "max_steps": 4, "optim": "sgd"}
    under, plain = (
        runs.outcome(runs.make(case, start, folder, **settings, **own))
        for own in ({"rho": 0.0, "lmbda": 0.0}, {"plain": True})
    )
    return [under["weights"], plain["weights"]]


@pytest.mark.skipif(
    compat.before("transformers", "5.5.4"),
    reason="accelerate divides losses of plain Trainer once more under accumulation",
)
def test_experts_are_balanced_as_much_under_accumulation(start, tmp_path):
    """TRL divides the loss that balances experts by the micro-batches, and so does Trainer with whole losses."""
    case = next(each for each in CASES if each.model == "mixtral")
    case = replace(case, settings={**case.settings, "learning_rate": 0.1, "router_aux_loss_coef": 1.0})
    under, plain = run_ranks(accumulated, 1, case, start, tmp_path, folder=tmp_path / "ranks")[0]
    torch.testing.assert_close(under, plain, rtol=1e-4, atol=1e-6)
