"""Within a pass the world is the role: losses that look at other processes see the replicas of their own role.

Four processes are two pairs, each role two replicas with half of a batch. Two processes have whole batches: the same
to rounding, if the replicas, and nobody else, make up for one another.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from tests.ecosystem import runs, trl_cases
from tests.ecosystem.sentence_transformers_cases import SENTENCE, ranking
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

GATHERING = partial(ranking, gather_across_devices=True)
CASES = [
    replace(
        trl_cases.SFT,
        inputs=partial(trl_cases.documents, words=(5, 8, 3)),
        settings={**trl_cases.FP32, "max_length": 32},
    ),
    replace(trl_cases.DPO, whole=True),
    replace(SENTENCE, title="negatives of other processes", inputs=GATHERING),
    replace(
        SENTENCE,
        title="negatives of other processes, cached",
        inputs=partial(GATHERING, cls=CachedMultipleNegativesRankingLoss, mini_batch_size=1),
        whole=True,
    ),
]


def spread(case, start, folder, batch_size: int) -> dict[str, Any]:
    """Four steps, the last of them in a second epoch of like batches."""
    settings = {
        "dropout": False,
        "samples": 12,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 4,
        "logging_steps": 1,
    }
    return runs.outcome(runs.make(case, start, folder, **settings, per_device_train_batch_size=batch_size))


def test_replicas_make_up_a_batch(case, start, tmp_path):
    whole, halves = (
        run_ranks(spread, n, case, start, tmp_path / str(n), 8 // n, folder=tmp_path / f"ranks{n}", timeout=120)
        for n in (2, 4)
    )
    for found in halves:
        torch.testing.assert_close(found["weights"], whole[0]["weights"], rtol=1e-4, atol=1e-6)
        for line, expected in zip(found["training"], whole[0]["training"], strict=True):
            names = line.keys() - {"total_flos"}  # these count padding, too
            assert line.keys() == expected.keys()
            assert [line[name] for name in names] == pytest.approx(
                [expected[name] for name in names], rel=1e-3, abs=1e-4
            )
