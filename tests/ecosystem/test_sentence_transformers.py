"""sentence-transformers' trainers under the mixin."""

from __future__ import annotations

import pytest

from tests.ecosystem import runs
from tests.ecosystem.properties import *  # noqa: F403
from tests.ecosystem.sentence_transformers_cases import CASES
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed


def test_parts_of_a_loss_are_those_of_one_pass(start, tmp_path):
    """They add up to the loss that is logged, at the look-ahead weights, or to that at the perturbed ones."""
    case = next(each for each in CASES if each.title == "SpladeLoss")
    lines = run_ranks(logged, 1, case, start, tmp_path, folder=tmp_path / "ranks")[0]
    sums = [sum(line[name] for name in PARTS) for line in lines]
    found = [[line[name] for line in lines] for name in ("loss", "perturbed_loss")]
    assert len(lines) == 4 and abs(found[0][0] - found[1][0]) > 1e-3
    assert any(sums == pytest.approx(each, abs=3e-4) for each in found)


PARTS = ("base_loss", "document_regularizer_loss", "query_regularizer_loss")


def logged(case, start, folder) -> list[dict]:
    """Log lines of four steps."""
    found = runs.outcome(runs.make(case, start, folder, max_steps=4, logging_steps=1, learning_rate=1e-3))
    return [line for line in found["training"] if "loss" in line]
