"""Processes that would train different things are found before the first step, those that drift apart within one."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_sampa import SAMPaTrainer
from tests import tiny
from tests.ranks import RankFailed, run_ranks


pytestmark = pytest.mark.distributed


def other_settings(folder, on_rank_1, model=tiny.bert, other_model=None):
    own = os.environ["RANK"] == "1"
    made = (other_model or model)() if own else model()
    tiny.run(folder, made, tiny.sentences(16), ddp_timeout=60, **(on_rank_1 if own else {}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.001 on rank 0, 0.5 on rank 1"),
        ({"lmbda": 0.7}, "lmbda: 0.2 on rank 0, 0.7 on rank 1"),
        ({"optim": "sgd"}, "optim: 'adamw_torch' on rank 0, 'sgd' on rank 1"),
        ({"weight_decay": 0.3}, "weight_decay: 0.01 on rank 0, 0.3 on rank 1"),
        ({"max_steps": 3}, "max_steps: -1 on rank 0, 3 on rank 1"),
        ({"eval_steps": 3}, "eval_steps: None on rank 0, 3 on rank 1"),
        ({"seed": 3}, "seed: 42 on rank 0, 3 on rank 1"),
    ],
)
def test_other_settings_on_one_process_are_named_before_the_first_step(tmp_path, changes, message):
    with pytest.raises(RankFailed) as failure:
        run_ranks(other_settings, 2, tmp_path, changes, folder=tmp_path, timeout=60)
    assert str(failure.value).count(message) >= 2  # by both
    assert "Make them equal on every process" in str(failure.value)


def dropping_bert():
    return tiny.bert(0.1)


class Noisy(BertForSequenceClassification):
    """BERT that says nothing of its dropout in its configuration."""

    def __init__(self):
        super().__init__(tiny.bert().config)
        self.dropout.p = 0.3


Noisy.__name__ = "BertForSequenceClassification"


@pytest.mark.parametrize(
    "model, message",
    [
        (tiny.bert_of_three_layers, "model.config.num_hidden_layers: 1 on rank 0, 3 on rank 1"),
        (dropping_bert, "model.config.hidden_dropout_prob: 0.0 on rank 0, 0.1 on rank 1"),
        (Noisy, "fingerprint of print.model.: [0-9]+ on rank 0, [0-9]+ on rank 1"),
        (
            tiny.frozen_bert,
            r"word_embeddings.weight: '\[60, 16\] torch.float32' on rank 0, '\[60, 16\] torch.float32 frozen'",
        ),
        (
            tiny.token_bert,
            "class of the model: 'BertForSequenceClassification' on rank 0, 'BertForTokenClassification'",
        ),
    ],
)
def test_another_model_on_one_process_is_named(tmp_path, model, message):
    with pytest.raises(RankFailed, match=message):
        run_ranks(other_settings, 2, tmp_path, {}, tiny.bert, model, folder=tmp_path, timeout=60)


class Drift(TrainerCallback):
    """Changes something on rank 1 after step 2, and writes down the steps that were taken."""

    def __init__(self, change, folder):
        self.change, self.folder, self.rank = change, folder, os.environ["RANK"]

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        (self.folder / f"steps{self.rank}").write_text(str(state.global_step))
        if self.rank == "1" and state.global_step == 2:
            self.change(args, model, optimizer)


def one_bit(args, model, optimizer):
    weight = model.classifier.weight.data
    weight.view(torch.int32)[0, 3] ^= 1


def another_rho(args, model, optimizer):
    args.rho = 0.3


def another_rate(args, model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.5


def moments(args, model, optimizer):
    optimizer.state[next(model.parameters())]["exp_avg"].add_(1)


def drift(folder, change, max_steps=8):
    args = tiny.arguments(folder, max_steps=max_steps, ddp_timeout=60, lr_scheduler_type="constant")
    SAMPaTrainer(tiny.bert(), args, train_dataset=tiny.sentences(32), callbacks=[Drift(change, folder)]).train()


@pytest.mark.parametrize(
    "change, message, steps",
    [
        (one_bit, r"rank\(s\) 1 hold others than rank 0", 2),
        (another_rho, "rho: 0.05 on rank 0, 0.3 on rank 1", 2),
        (another_rate, "lr of optimizer group 0: 0.001 on rank 0, 0.5 on rank 1", 2),
        (moments, r"rank\(s\) 1 hold others than rank 0", 3),  # shows in the weights after the next update
    ],
    ids=["one bit", "rho", "rate", "moments"],
)
def test_ranks_that_drift_apart_end_the_run_within_a_step(tmp_path, change, message, steps):
    with pytest.raises(RankFailed, match=message):
        run_ranks(drift, 2, tmp_path, change, folder=tmp_path, timeout=60)
    for rank in range(2):
        assert (tmp_path / f"steps{rank}").read_text() == str(steps)


def test_weights_that_differ_after_the_last_step_end_the_run(tmp_path):
    with pytest.raises(RankFailed, match=r"rank\(s\) 1 hold others than rank 0"):
        run_ranks(drift, 2, tmp_path, one_bit, 2, folder=tmp_path, timeout=60)


class ChangesLate(SAMPaTrainer):
    """Gradients after backward, from some step on."""

    def training_step(self, *given, **named):
        loss = super().training_step(*given, **named)
        if self.state.global_step >= 5:
            for param in self.model.parameters():
                if param.grad is not None:
                    param.grad.mul_(0.5)
        return loss


def changed_late(folder, changes):
    args = tiny.arguments(folder, max_steps=8, **changes)
    ChangesLate(model=tiny.bert(), args=args, train_dataset=tiny.sentences(64)).train()


@pytest.mark.parametrize("changes", [{}, {"shard_optimizer": True}, {"method": "sam"}], ids=str)
def test_gradients_that_are_changed_from_some_step_on_are_refused(tmp_path, changes):
    with pytest.raises(RankFailed, match="but it began to in this step, .* Set overlap_exchange=False"):
        run_ranks(changed_late, 2, tmp_path, changes, folder=tmp_path / "ranks")
    run_ranks(changed_late, 2, tmp_path, {**changes, "overlap_exchange": False}, folder=tmp_path / "after")
