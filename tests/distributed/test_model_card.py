"""The model card says what the run did, also where two processes read one batch."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch.distributed as dist
from accelerate import ParallelismConfig
from huggingface_hub import ModelCard
from transformers import Trainer

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.finetuning.baseline import BaselineTrainer
from hf_sampa.finetuning.training_arguments import FineTuningArguments
from tests import sharded, tiny
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed


def written(folder, method):
    args = tiny.arguments(folder, method=method, max_steps=2, rho=0.07, lmbda=0.1, gradient_accumulation_steps=2)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(18))
    trainer.train()
    trainer.create_model_card()
    trainer.create_model_card()


@pytest.mark.parametrize(("method", "batch_size"), [("sampa", 8), ("sam", 16)])
def test_the_card_of_a_run_on_two_processes(tmp_path, method, batch_size):
    run_ranks(written, 2, tmp_path, method, folder=tmp_path / "ranks")
    card = ModelCard.load(tmp_path / "README.md")
    text = card.text
    assert text.count(f"- total_train_batch_size: {batch_size}\n") == text.count("total_train_batch_size") == 1
    assert f"- method: {method}\n" in text and "- rho: 0.07\n" in text
    assert ("- lmbda: 0.1\n" in text) == (method == "sampa")
    assert "sharpness-aware-minimization" in card.data.tags
    assert ("arxiv:2410.10683" in card.data.tags) == ("sampa" in card.data.tags) == (method == "sampa")
    assert "sam" not in card.data.tags
    processes = "2: 1 at perturbed and 1 at look-ahead weights" if method == "sampa" else "2, data parallel"
    assert f"- processes: {processes}\n" in text
    assert ("xie2024sampa" in text) == (method == "sampa") and ("foret2021" in text) == (method == "sam")


def saves_while_the_card_is_written(folder):
    """The second process saves while the first, which it does not wait for, is in the middle of writing the card."""
    trainer = SAMPaTrainer(
        model=tiny.bert(), args=tiny.arguments(folder, max_steps=1), train_dataset=tiny.sentences(18)
    )
    card = folder / "README.md"
    if trainer.is_world_process_zero():
        card.write_text("half of it")
    dist.barrier()
    if not trainer.is_world_process_zero():
        save = Trainer._save

        def finished_meanwhile(self, *args):
            save(self, *args)
            card.write_text("all of it")

        with patch.object(Trainer, "_save", finished_meanwhile):
            trainer._save(folder)
    dist.barrier()
    return card.read_text()


def test_a_process_that_does_not_save_does_not_touch_the_card(tmp_path):
    (tmp_path / "out").mkdir()
    found = run_ranks(saves_while_the_card_is_written, 2, tmp_path / "out", folder=tmp_path / "ranks")
    assert found == ["all of it"] * 2


def card_of(folder, method, changes):
    settings = {"method": method, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, **changes}
    kinds = {"adamw": (BaselineTrainer, OnShards)}.get(method, (SAMPaTrainer, sharded.OnCPU))
    with patch.object(SAMPaTrainingArguments, "METHODS", FineTuningArguments.METHODS):
        args = tiny.arguments(folder, **settings)
    data = {"train_dataset": tiny.sentences(18), "eval_dataset": tiny.sentences(7)}
    trainer = kinds["fsdp" in changes](model=tiny.bert(), args=args, **data)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()


def lines(file) -> set[str]:
    """Of a card, but for what no two runs share."""
    apart = ("Written by hf_sampa", "seconds per step")
    return {line for line in file.read_text().splitlines() if not any(word in line for word in apart)}


class OnShards(sharded.AsOnGPU, BaselineTrainer): ...


HSDP = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}


@sharded.needs_versions
@pytest.mark.parametrize(
    ("method", "world", "changes", "processes"),
    [
        ("sampa", 4, {}, "4, two roles of 2 shards (FSDP2)"),
        ("sam", 4, HSDP, "4, one role of 2 replicas x 2 shards (FSDP2)"),
        ("adamw", 2, {}, "2, 2 shards (FSDP2)"),
        pytest.param("sampa", 8, HSDP, "8, two roles of 2 replicas x 2 shards (FSDP2)", marks=pytest.mark.whole),
    ],
)
def test_the_card_of_a_run_on_shards_is_that_of_any_other_but_for_its_mesh(
    tmp_path, method, world, changes, processes
):
    kinds = {"whole": {}, "shards": {**sharded.FSDP, **changes}}
    for kind, settings in kinds.items():
        run_ranks(card_of, world, tmp_path / kind / "out", method, settings, folder=tmp_path / kind)
    whole, shards = (lines(tmp_path / kind / "out" / "README.md") for kind in kinds)
    (line,) = shards - whole
    assert line == f"- processes: {processes}"
    (line,) = whole - shards
    assert line.startswith("- processes: ")
