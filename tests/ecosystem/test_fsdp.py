"""Trainers of other libraries on shards: two roles of two processes, which each hold half of a model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests import sharded, tiny
from tests.ecosystem import runs, trl_cases
from tests.ecosystem.sentence_transformers_cases import SENTENCE, SAMPaSentenceTransformerTrainer
from tests.ranks import RankFailed, run_ranks


pytestmark = [pytest.mark.distributed, pytest.mark.whole, sharded.needs_versions]


class SFTOnShards(sharded.AsOnGPU, trl_cases.SAMPaSFTTrainer): ...


class SentenceOnShards(sharded.AsOnGPU, SAMPaSentenceTransformerTrainer): ...


def shards(layer: str) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {**sharded.DEFAULTS, "transformer_layer_cls_to_wrap": [layer]}}


SFT = replace(
    trl_cases.SFT,
    inputs=partial(trl_cases.documents, words=(5, 8, 3)),
    settings={**trl_cases.FP32, "max_length": 32},
)
SETTINGS = {"dropout": False, "samples": 12, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2}


def trained(case, start, folder, changes) -> dict[str, Any]:
    saves = {"save_strategy": "steps", "save_steps": 2}
    trainer = runs.make(case, start, folder, **{**SETTINGS, **saves, **changes})
    trainer.train()
    assert trainer.sampa.weights.sharded == bool(changes)
    trainer.save_model()
    resumed = runs.make(case, start, folder, **{**SETTINGS, **changes})
    resumed.train(str(folder / "checkpoint-2"))
    found = {name: sharded.whole_weights(each.model) for name, each in {"run": trainer, "resumed": resumed}.items()}
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {**found, "losses": losses, "evaluation": trainer.evaluate()["eval_loss"]}


def test_trl_on_shards_is_what_it_is_without(start, tmp_path):
    """To rounding; goes on with the same bits; and what it saved the library loads."""
    cases = {"whole": (SFT, {}), "shards": (replace(SFT, trainer=SFTOnShards), shards("LlamaDecoderLayer"))}
    whole, found = (
        run_ranks(trained, 4, case, start, tmp_path / kind, changes, folder=tmp_path / f"{kind}-ranks", timeout=120)
        for kind, (case, changes) in cases.items()
    )
    for rank in found:
        assert sharded.deviation(rank["run"], whole[0]["run"]) < 1e-6
        assert tiny.differing(rank["run"], rank["resumed"]) == []
        assert rank["losses"] == pytest.approx(whole[0]["losses"], rel=1e-5)
        assert rank["evaluation"] == pytest.approx(whole[0]["evaluation"], rel=1e-5)
    with torch.no_grad():
        outputs = [SFT.outputs(SFT.alone(tmp_path / kind)) for kind in cases]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-6)


def test_sentence_transformers_on_shards_is_refused(start, tmp_path):
    case = replace(SENTENCE, trainer=SentenceOnShards)
    words = "fsdp: expected a trainer that saves the weights that it is given, got SentenceTransformerTrainer"
    with pytest.raises(RankFailed, match=words):
        run_ranks(trained, 2, case, start, tmp_path / "out", shards("TransformerBlock"), folder=tmp_path / "ranks")
