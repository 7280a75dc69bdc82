"""What is trained is what the base optimizer holds: weights outside of the model too, and nothing that it leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_sampa import SAMPaMixin, SAMPaTrainer
from hf_sampa.engine.trained import Trained
from tests import tiny
from tests.ranks import run_ranks


class Metric(nn.Module):
    """A loss with weights, a frozen guide, and a buffer of its own; it knows the model, too."""

    def __init__(self, model):
        super().__init__()
        torch.manual_seed(5)
        self.model, self.scale, self.guide = model, nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, logits, labels):
        self.seen += len(labels)
        with torch.no_grad():
            target = self.guide(logits)
        return nn.functional.cross_entropy(self.scale(logits), labels) + (logits - target).square().mean() / 10


class ZeroGradients(TrainerCallback):
    """Trainer zeroes those of the model only."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


class WithLoss(Trainer):
    """Trains the weights of its loss with those of the model, as sentence-transformers' trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = Metric(self.model)
        self.add_callback(ZeroGradients())

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, lr = (torch.optim.SGD, 1.0) if self.args.optim == "sgd" else (torch.optim.AdamW, 1e-2)
            self.optimizer = kind(self.loss.parameters(), lr=lr)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class SAMPaWithLoss(SAMPaMixin, WithLoss):
    pass


def train(folder, kind=SAMPaWithLoss, resume=None, **changes):
    # In order: building the loss has drawn from the generator that plain Trainer's sampler is seeded by.
    order = {"train_sampling_strategy": "sequential"}
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.1, **order, **changes}
    trainer = kind(tiny.bert(), tiny.arguments(folder, **settings), train_dataset=tiny.sentences(18))
    outcome = tiny.outcome(trainer, resume)
    return {**outcome, "loss": {name: value.clone() for name, value in trainer.loss.state_dict().items()}}


def test_rho_and_lambda_of_zero_are_plain_trainer(tmp_path):
    """P1, with weights outside of the model, of which clipping knows nothing."""
    ours, plain = train(tmp_path, rho=0.0, lmbda=0.0), train(tmp_path, WithLoss)
    for part in ("weights", "optimizer", "steps"):
        assert tiny.differing(ours[part], plain[part]) == []
    seen = {"ours": ours["loss"].pop("seen").item(), "plain": plain["loss"].pop("seen").item()}
    assert tiny.differing(ours["loss"], plain["loss"]) == []
    assert seen["ours"] == seen["plain"] + 4  # B_T's, whose gradient is carried


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"variant": "gsam"}], ids=["sam", "gsam"])
def test_two_processes_are_one_and_resumed_is_never_stopped(tmp_path, changes):
    whole = train(tmp_path / "one", **changes)
    for outcome in run_ranks(train_with, 2, tmp_path / "two", changes, folder=tmp_path):
        assert tiny.differing(outcome, whole) == []
    resumed = train(tmp_path / "again", resume=str(tmp_path / "two" / "checkpoint-3"), **changes)
    assert tiny.differing(tiny.comparable(resumed), tiny.comparable(whole)) == []


def train_with(folder, changes):
    return train(folder, **changes)


def test_the_lookahead_clips_what_trainer_clips(tmp_path):
    """lambda = 1 and rho = 0 in the first step: G_0 = g_1, taken where the base optimizer would go with the clipped g_0.

    That is SGD, since AdamW's first step hardly depends on the norm.
    """
    sampa, steps = train(tmp_path, optim="sgd", rho=0.0, lmbda=1.0, max_steps=1), []

    class Watching(WithLoss):
        def _clip_grad_norm(self, model):
            steps.append({name: param.grad.clone() for name, param in model.named_parameters()})
            return super()._clip_grad_norm(model)

    # Plain Trainer's first step goes to y_1; its second takes g_1 there, on the same batches.
    train(tmp_path, Watching, optim="sgd", max_steps=2, lr_scheduler_type="constant")
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in steps[1].values()]))
    logged = next(line["grad_norm"] for line in sampa["logs"] if "grad_norm" in line)
    assert logged == pytest.approx(norm.item(), rel=1e-5)


def test_names_are_the_same_in_every_run():
    model, loss = nn.Linear(2, 2), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*loss.parameters(), *model.parameters(), extra := nn.Parameter(torch.ones(1))], lr=1)
    trained = Trained(optimizer, model, {"loss": loss})
    assert trained.names == ["weight", "bias", "loss.weight", "loss.bias", "optimizer.0.4"]
    assert trained.of_model == 2 and trained.params[-1] is extra


def test_frozen_weights_in_the_optimizer_are_not_trained():
    model, loss = nn.Linear(2, 2), nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    loss.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    trained = Trained(optimizer, model, {"loss": loss})
    assert trained.names == ["weight", "loss.bias"] and trained.of_model == 1
    assert [id(param) for param in trained.params] == [id(model.weight), id(loss.bias)]


def test_a_parameter_that_the_optimizer_does_not_hold_is_refused(tmp_path):
    model = tiny.frozen_bert()
    trainer = SAMPaTrainer(model, tiny.arguments(tmp_path, max_steps=2), train_dataset=tiny.sentences(16))
    trainer.train()
    model.requires_grad_(True)
    with pytest.raises(
        ValueError, match="5 of 25 are not in it, the first being 'bert.embeddings.word_embeddings.weight'"
    ):
        trainer.train()
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    trainer.optimizer = trainer.lr_scheduler = None  # as the message says
    trainer.train()
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, before)
