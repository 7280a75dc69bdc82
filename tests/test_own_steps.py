"""training_step, compute_loss, get_batch_samples of one's own: each is what a pass does, or is refused in the first step."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from hf_sampa import SAMPaMixin, SAMPaTrainer
from tests import models, tiny
from tests.ranks import run_ranks


class OwnStep(Trainer):
    """Forward, backward and nothing of Trainer's, as the documentation of transformers shows it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OwnStepAbove(SAMPaTrainer):
    training_step = OwnStep.training_step


class OwnStepBelow(SAMPaMixin, OwnStep):
    pass


class AssignedGradients(SAMPaTrainer):
    """Gradients by torch.autograd.grad, put into ``.grad`` by hand."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        params = list(model.parameters())
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad if param.grad is None else param.grad + grad
        return loss.detach()


class Summed(SAMPaTrainer):
    """Two losses, each with a backward of its own, whose gradients are added up by hand, as gradient surgery does."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        params, found = list(model.parameters()), []
        before = [param.grad for param in params]
        for part in (loss * 0.5, loss * 0.5):
            model.zero_grad()
            self.accelerator.backward(part, retain_graph=True)
            found.append([param.grad.clone() for param in params])
        for param, one, other, earlier in zip(params, *found, before, strict=True):
            param.grad = one + other if earlier is None else one + other + earlier
        return loss.detach()


class Halved(SAMPaTrainer):
    """Changes gradients in place after backward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        for param in model.parameters():
            param.grad.mul_(0.5)
        return loss


class HalvedLoss(SAMPaTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss * 0.5)
        return loss.detach()


class TwoBackwards(SAMPaTrainer):
    """A loss whose halves go backward one after the other."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        halves = []
        for _ in range(2):
            loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss / 2)
            halves.append(loss.detach() / 2)
        return sum(halves)


def train(folder, trainer_class=SAMPaTrainer, model=tiny.bert, data=None, **changes):
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, **changes}
    return tiny.run(folder, model, data or tiny.sentences(22), trainer_class=trainer_class, **settings)


@pytest.mark.parametrize("trainer_class", [OwnStepAbove, OwnStepBelow, AssignedGradients])
def test_a_step_of_ones_own_is_the_gradient_of_a_pass(tmp_path, trainer_class):
    assert tiny.differing(train(tmp_path, trainer_class), train(tmp_path)) == []


def test_gradients_that_are_put_together_or_changed_after_backward(tmp_path):
    """In every step, not in the first ones only; halves are exact in binary."""
    settings = {"gradient_accumulation_steps": 1, "optim": "sgd"}
    assert tiny.differing(train(tmp_path, Summed, **settings), train(tmp_path, **settings)) == []
    assert tiny.differing(train(tmp_path, Halved, **settings), train(tmp_path, HalvedLoss, **settings)) == []


def test_a_step_with_two_backward_passes(tmp_path):
    """Halves add up to the whole, to rounding; gradients that come in pieces travel after backward."""
    own, usual = (train(tmp_path, kind, optim="sgd")["weights"] for kind in (TwoBackwards, SAMPaTrainer))
    torch.testing.assert_close(own, usual, rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("trainer_class", [OwnStepAbove, AssignedGradients, TwoBackwards, Halved])
def test_two_processes_are_one(tmp_path, trainer_class):
    expected = train(tmp_path / "one", trainer_class)
    for outcome in run_ranks(train, 2, tmp_path / "two", trainer_class, folder=tmp_path):
        assert tiny.differing(outcome, expected) == []


class Watched(SAMPaTrainer):
    """Keeps what super().training_step is given and returns, per micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen.append((len(inputs["input_ids"]), loss.item()))
        return loss


def test_super_gives_the_loss_of_the_micro_batch(tmp_path):
    """As in plain Trainer: its share of the update batch's, so that they add up to what is logged."""
    trainer = Watched(
        tiny.bert(),
        tiny.arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2),
        train_dataset=tiny.sentences(22),
    )
    trainer.train()
    # The passes that count are those of B_1, B_2 and B_3; the first epoch ends with 4 + 2 samples.
    assert [size for size, _ in trainer.seen] == [4, 4, 4, 2, 4, 4]
    losses = [loss for _, loss in trainer.seen]
    logged = [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]
    assert [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)] == pytest.approx(logged, rel=1e-5)


def test_outside_of_a_run_training_step_is_plain_trainers(tmp_path):
    ours, plain = (
        kind(tiny.bert(), tiny.arguments(tmp_path), train_dataset=tiny.sentences(8))
        for kind in (SAMPaTrainer, Trainer)
    )
    losses = []
    for trainer in (ours, plain):
        trainer.current_gradient_accumulation_steps = 1
        inputs = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.training_step(trainer.model, inputs, torch.tensor(4)))
    assert torch.equal(*losses)
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


class NoBackward(SAMPaTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.compute_loss(model, self._prepare_inputs(inputs)).detach()


class WholeStep(SAMPaTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class Generating(SAMPaTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        model.generate(inputs["input_ids"][:, :3], max_new_tokens=2)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    "trainer_class, model, message",
    [
        (
            NoBackward,
            tiny.bert,
            "after that of NoBackward no trained parameter has one. Call self.accelerator.backward",
        ),
        (
            WholeStep,
            tiny.bert,
            "the optimizer's step was called within it, while the weights are displaced. Leave steps",
        ),
        (Generating, models.gpt2, "asked to generate within it.*Generate the data before training"),
    ],
)
def test_what_is_no_gradient_is_refused_in_the_first_step(tmp_path, trainer_class, model, message):
    data = models.texts(16) if model is models.gpt2 else tiny.sentences(16)
    made, steps = model(), tiny.Recorder()
    before = [param.detach().clone() for param in made.parameters()]
    trainer = trainer_class(made, tiny.arguments(tmp_path), train_dataset=data, callbacks=[steps])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert steps.weights == [] and tiny.differing(before, list(made.parameters())) == []


class Mixup(SAMPaTrainer):
    """Changes its inputs in place."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        x = inputs["pixel_values"]
        x.mul_(0.7).add_(x.flip(0), alpha=0.3)
        return super().compute_loss(model, inputs, *args, **kwargs)


class MixupOnCopy(SAMPaTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        x = inputs["pixel_values"].clone()
        x.mul_(0.7).add_(x.flip(0), alpha=0.3)
        return super().compute_loss(model, {**inputs, "pixel_values": x}, *args, **kwargs)


@pytest.mark.distributed
def test_every_pass_sees_inputs_of_its_own(tmp_path):
    args = (Mixup, tiny.vit, tiny.images(22))
    one = train(tmp_path / "one", *args)
    for outcome in run_ranks(train, 2, tmp_path / "two", *args, folder=tmp_path):
        assert tiny.differing(outcome, one) == []
    assert tiny.differing(train(tmp_path / "copy", MixupOnCopy, tiny.vit, tiny.images(22)), one) == []


class Relabelled(SAMPaTrainer):
    """Changes the samples as they are read."""

    def get_batch_samples(self, *args, **kwargs):
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        return [{**each, "labels": torch.zeros_like(each["labels"])} for each in samples], num_items


def test_samples_are_those_that_get_batch_samples_returns(tmp_path):
    relabelled = [{**item, "labels": 0} for item in tiny.sentences(22)]
    outcome, expected = train(tmp_path, Relabelled), train(tmp_path, data=relabelled)
    assert tiny.differing(outcome, expected) == []


class OldSignature(Trainer):
    """compute_loss as it was before it was told of items."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        assert set(kwargs) <= {"num_items_in_batch"}
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OldSignatureAbove(SAMPaMixin, OldSignature):
    pass


def test_compute_loss_is_called_as_upstream_calls_it(tmp_path):
    assert tiny.differing(train(tmp_path, OldSignatureAbove), train(tmp_path)) == []


class AuxiliaryLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        auxiliary = model.classifier.weight.square().sum()
        return loss + auxiliary / self.current_gradient_accumulation_steps


class SAMPaAuxiliaryLoss(SAMPaMixin, AuxiliaryLoss):
    pass


def test_parts_of_a_loss_are_not_divided_twice(tmp_path):
    large, small = (
        train(tmp_path, SAMPaAuxiliaryLoss, data=tiny.sentences(16), optim="sgd", learning_rate=0.1, **shape)[
            "weights"
        ]
        for shape in (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        )
    )
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-6)
