"""Before the first step: passes that leave behind what is not followed, or differ between processes, are found there."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_sampa import SAMPaMixin, SAMPaTrainer
from tests import tiny
from tests.ranks import RankFailed, run_ranks


def train(folder, trainer_class=SAMPaTrainer, model=tiny.bert, resume=None, watch=None, **changes):
    trainer = trainer_class(
        model(), tiny.arguments(folder, **{"max_steps": 5, **changes}), train_dataset=tiny.sentences(18)
    )
    outcome = tiny.outcome(trainer, resume)
    return outcome if watch is None else {**outcome, "watched": watch(trainer)}


def check_two_and_plain(folder, trainer_class, plain_class, expected):
    """Two processes end as one did, and without perturbation and look-ahead it is plain Trainer."""
    for outcome in run_ranks(train, 2, folder / "two", trainer_class, folder=folder):
        assert tiny.differing(outcome, expected) == []
    zero = train(folder / "zero", trainer_class, rho=0.0, lmbda=0.0)["weights"]
    assert tiny.differing(zero, train(folder / "plain", plain_class)["weights"]) == []


class HiddenTeacher(nn.Module):
    """A moving teacher in a list, where no module has it."""

    def __init__(self):
        super().__init__()
        self.student = tiny.bert()
        self.hidden = [copy.deepcopy(self.student.classifier).requires_grad_(False)]

    def forward(self, input_ids, labels, attention_mask=None):
        with torch.no_grad():
            for own, followed in zip(self.hidden[0].parameters(), self.student.classifier.parameters(), strict=True):
                own.lerp_(followed, 0.001)
        outputs = self.student(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        taught = self.hidden[0](self.student.bert(input_ids, attention_mask).pooler_output)
        return {"loss": outputs.loss + 100 * (outputs.logits - taught).square().mean(), "logits": outputs.logits}


class OwnLoader(SAMPaTrainer):
    """Draws from an iterator of its own within the loss."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "scales"):
            self.scales = iter([1.0, 2.0, 3.0] * 100)
        return super().compute_loss(model, inputs, *args, **kwargs) * next(self.scales)


class Annealed(SAMPaTrainer):
    """Weighs the loss by a count in a closure."""

    count = itertools.count(1)

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) * next(self.count)


class UnseededNoise(SAMPaTrainer):
    """Draws from a generator that nobody can find."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) * torch.rand((), generator=GENERATOR).item()


GENERATOR = torch.Generator()


@pytest.mark.parametrize("method", ["sampa", "sam"])
@pytest.mark.parametrize(
    "trainer_class, model",
    [
        (SAMPaTrainer, HiddenTeacher),
        (OwnLoader, tiny.bert),
        (Annealed, tiny.bert),
        (UnseededNoise, tiny.bert),
    ],
)
def test_what_passes_leave_behind_unseen_is_refused_before_the_first_step(tmp_path, trainer_class, model, method):
    made, steps = model(), tiny.Recorder()
    before = [param.detach().clone() for param in made.parameters()]
    args = tiny.arguments(tmp_path, method=method)
    trainer = trainer_class(made, args, train_dataset=tiny.sentences(16), callbacks=[steps])
    message = (
        r"of one batch at the same weights the loss was [\d.]+ and then [\d.]+, .* \(rank 0\).* the training loader"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert steps.weights == [] and tiny.differing(before, list(made.parameters())) == []


class Adversary(SAMPaTrainer):
    """Trains a discriminator of its own within the step, by an optimizer of its own."""

    def __init__(self, *args, optimizer, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.critic = nn.Linear(2, 1)
        self.own = optimizer(self.critic.parameters())

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        outputs = model(**self._prepare_inputs(inputs))
        self.own.zero_grad()
        self.critic(outputs.logits.detach()).square().mean().backward()
        self.own.step()
        loss = (outputs.loss - self.critic(outputs.logits).mean()) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def adversary(folder, optimizer):
    trainer = Adversary(
        tiny.bert(),
        tiny.arguments(folder, max_steps=5),
        train_dataset=tiny.sentences(18),
        optimizer=optimizer,
    )
    return {**tiny.outcome(trainer), "critic": list(trainer.critic.parameters())}


def without_state(params):
    return torch.optim.SGD(params, lr=0.1)


def with_moments(params):
    return torch.optim.Adam(params, lr=0.1)


@pytest.mark.distributed
def test_an_optimizer_of_ones_own_within_a_step(tmp_path):
    """Without state its step is undone like all that a pass does to weights; with state it is refused."""
    expected = adversary(tmp_path / "one", without_state)
    for outcome in run_ranks(adversary, 2, tmp_path / "two", without_state, folder=tmp_path):
        assert tiny.differing(outcome, expected) == []
    with pytest.raises(
        ValueError, match="a step of Adam was taken within it, which keeps state.*Take it in a callback"
    ):
        adversary(tmp_path / "refused", with_moments)


# ---- What the first pass makes ----


class Remembering(Trainer):
    """Remembers in its first pass what it starts from, and counts."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "anchor"):
            self.anchor = [param.detach().clone() for param in model.parameters()]
            self.teacher = copy.deepcopy(model).requires_grad_(False)
            self.calls = 0
        self.calls += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        pull = sum((own - kept).square().sum() for own, kept in zip(model.parameters(), self.anchor, strict=True))
        with torch.no_grad():
            for own, followed in zip(self.teacher.parameters(), model.parameters(), strict=True):
                own.lerp_(followed, 0.1)
            taught = self.teacher(**inputs).logits
        return loss + 0.1 * pull + (model(**inputs).logits - taught).square().mean()


class SAMPaRemembering(SAMPaMixin, Remembering):
    pass


def remembered(trainer):
    return trainer.anchor, list(trainer.teacher.parameters()), trainer.calls


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_weights_remembered_in_the_first_pass_are_the_first_ones(tmp_path, method):
    settings = {"method": method} if method == "sampa" else {"method": method, "per_device_train_batch_size": 2}
    one = {**settings, "per_device_train_batch_size": 4}
    expected = train(tmp_path / "one", SAMPaRemembering, watch=remembered, **one)
    anchor, _, calls = expected["watched"]
    assert tiny.differing(anchor, [param.detach() for param in tiny.bert().parameters()]) == []
    assert calls == 6  # with the pass that made it
    if method == "sampa":
        for outcome in run_ranks(
            train, 2, tmp_path / "two", SAMPaRemembering, tiny.bert, None, remembered, folder=tmp_path
        ):
            assert tiny.differing(outcome, expected) == []


class Anchored(SAMPaTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "anchor"):
            self.anchor = [param.detach().clone() for param in model.parameters()]
        pull = sum((own - kept).square().sum() for own, kept in zip(model.parameters(), self.anchor, strict=True))
        return super().compute_loss(model, inputs, *args, **kwargs) + pull


def test_they_are_after_a_resume_too(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "watch": lambda trainer: trainer.anchor}
    expected = train(tmp_path / "whole", Anchored, **settings)
    resumed = train(tmp_path / "again", Anchored, resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert tiny.differing(tiny.comparable(resumed), tiny.comparable(expected)) == []
    assert tiny.differing(resumed["watched"], [param.detach() for param in tiny.bert().parameters()]) == []


def test_a_teacher_of_the_first_pass_has_to_be_there_on_resume(tmp_path):
    train(tmp_path, SAMPaRemembering, save_strategy="steps", save_steps=3)
    with pytest.raises(
        ValueError, match="no attribute `?'?teacher.*What the first pass makes is to be made before train"
    ):
        train(tmp_path / "again", SAMPaRemembering, resume=str(tmp_path / "checkpoint-3"))


class NaNLoss(SAMPaTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * float("nan")


def test_a_loss_that_is_not_finite_says_nothing(tmp_path):
    trainer = NaNLoss(tiny.bert(), tiny.arguments(tmp_path, max_steps=3), train_dataset=tiny.sentences(18))
    trainer.train()
    assert trainer.sampa.skipped_steps == 3


class Bank(SAMPaTrainer):
    """A memory bank on the trainer that is larger than what is usually looked at."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bank, self.place = torch.zeros(200, 60), 0
        self.data = torch.ones(200, 60)

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = torch.nn.functional.one_hot(inputs["input_ids"], 60).float().mean(1)
        self.bank[(torch.arange(len(rows)) + self.place) % 200] = rows
        self.place += len(rows)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * (1 + (rows @ self.bank.T).mean()) * self.data.mean()


def bank(trainer):
    return trainer.bank, trainer.place, sorted(trainer._run.steps.collected.changed)


@pytest.mark.distributed
def test_a_large_tensor_that_passes_change_is_followed(tmp_path):
    expected = train(tmp_path / "one", Bank, watch=bank)
    assert expected["watched"][1:] == (18, ["bank", "place"])
    assert int(expected["watched"][0].any(1).sum()) == 18  # each update batch once
    for outcome in run_ranks(train, 2, tmp_path / "two", Bank, tiny.bert, None, bank, folder=tmp_path):
        assert tiny.differing(outcome, expected) == []


class FromData(nn.Module):
    """Its first forward pass sets a trained weight from the batch, as ActNorm does, and makes a layer."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.bert()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("done", torch.tensor(False))

    def forward(self, input_ids, labels, attention_mask=None):
        outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if not self.done:
            self.scale.data.copy_(1 / outputs.logits.detach().std(0))
            self.done.fill_(True)
        if not hasattr(self, "extra"):
            self.extra = nn.utils.skip_init(nn.Linear, 2, 2).requires_grad_(False)
            nn.init.eye_(self.extra.weight)
            nn.init.zeros_(self.extra.bias)
        logits = outputs.logits * self.scale + self.extra(outputs.logits)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.distributed
def test_a_model_that_begins_with_what_it_sees_first(tmp_path):
    alone = train(tmp_path / "one", model=FromData)
    for outcome in run_ranks(train, 2, tmp_path / "two", SAMPaTrainer, FromData, folder=tmp_path):
        assert tiny.differing(outcome, alone) == []
    plain = train(tmp_path / "plain", Trainer, FromData)
    zero = train(tmp_path / "zero", model=FromData, rho=0.0, lmbda=0.0)
    assert tiny.differing(zero["weights"], plain["weights"]) == []


# ---- Processes that differ in what no setting says ----


class RankWeight(SAMPaTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (1.01 if os.environ["LOCAL_RANK"] == "1" else 1.0)


@pytest.mark.distributed
def test_another_loss_on_one_process_is_found_before_the_first_step(tmp_path):
    with pytest.raises(RankFailed) as failure:
        run_ranks(train, 2, tmp_path, RankWeight, folder=tmp_path, timeout=60)
    assert re.search(r"but rank 0 found [\d.]+ and rank 1 [\d.]+ .* Something else differs", str(failure.value))
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- What is followed: the same on one process and on two, and after a resume ----


def counted(folder, name, resume=None, **changes):
    trainer_class, model = FOLLOWED[name]
    settings = {"save_strategy": "steps", "save_steps": 3, **changes}
    return train(folder, trainer_class, model, resume, **settings)


class LazyList(SAMPaTrainer):
    def compute_loss(self, *args, **kwargs):
        if not hasattr(self, "losses"):
            self.losses = []
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss * (1 + 0.01 * len(self.losses))


class ClassDefault(SAMPaTrainer):
    mean = 1.0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean


def with_local_meter():
    class Meter:
        def __init__(self):
            self.count = 0

        def __call__(self):
            self.count += 1
            return self.count

    class LocalMeter(SAMPaTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.meter = Meter()

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (1 + 0.01 * self.meter())

    return LocalMeter


class PointedBank(nn.Module):
    """A queue in a buffer, whose pointer is a number of Python's, as MoCo's often is."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.bert()
        self.register_buffer("queue", torch.zeros(6, 16))
        self.place = 0

    def forward(self, input_ids, labels):
        outputs = self.inner.bert(input_ids).pooler_output
        logits = self.inner.classifier(outputs)
        penalty = (outputs @ self.queue.T.clone()).square().mean()
        for row in outputs.detach():
            self.queue[self.place] = row
            self.place = (self.place + 1) % 6
        return {"loss": nn.functional.cross_entropy(logits, labels) + penalty, "logits": logits}


class Normalised(nn.Module):
    """Divides its loss by a running mean, which its first pass makes."""

    mean = None

    def __init__(self):
        super().__init__()
        self.inner = tiny.bert()

    def forward(self, input_ids, labels):
        outputs = self.inner(input_ids=input_ids, labels=labels)
        now = outputs.loss.item()
        self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        return {"loss": outputs.loss / self.mean, "logits": outputs.logits}


class Caching(nn.Module):
    """Looks up a number in its first pass, for all others."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.bert()

    def forward(self, input_ids, labels):
        if not hasattr(self, "width"):
            self.width = self.inner.config.hidden_size
        outputs = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": outputs.loss / self.width, "logits": outputs.logits}


class WarmUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, loss):
        self.calls += 1
        return loss * min(1.0, self.calls / 4)


class Warming(SAMPaTrainer):
    """A criterion that counts its calls."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.criterion = WarmUp()

    def compute_loss(self, *args, **kwargs):
        return self.criterion(super().compute_loss(*args, **kwargs))


FOLLOWED = {
    "lazy list": (LazyList, tiny.bert),
    "default of the class": (ClassDefault, tiny.bert),
    "local class": (with_local_meter(), tiny.bert),
    "pointer": (SAMPaTrainer, PointedBank),
    "criterion": (Warming, tiny.bert),
    "made by forward": (SAMPaTrainer, Normalised),
    "cached by forward": (SAMPaTrainer, Caching),
}


def all_counted(folder):
    return {name: counted(folder / name, name) for name in FOLLOWED}


@pytest.mark.distributed
def test_numbers_wherever_they_are_kept(tmp_path):
    expected = all_counted(tmp_path / "one")
    for outcome in run_ranks(all_counted, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(outcome, expected) == []
    for name in FOLLOWED:
        resumed = counted(tmp_path / "again", name, str(tmp_path / "one" / name / "checkpoint-3"))
        assert tiny.differing(tiny.comparable(resumed), tiny.comparable(expected[name])) == [], name


class StopsItself(SAMPaTrainer):
    """Ends the training, and asks for a checkpoint, by what a loss is; those of the two passes differ."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        self.control.should_save = len(self.seen) == 2
        self.control.should_training_stop = len(self.seen) == 3
        return loss


def stopped(folder):
    outcome = train(folder, StopsItself)
    return outcome, sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.distributed
def test_what_a_pass_tells_the_loop_is_that_of_the_reported_pass(tmp_path):
    expected, checkpoints = stopped(tmp_path / "one")
    assert expected["steps"] == 3 and checkpoints == ["checkpoint-2"]
    first, second = run_ranks(stopped, 2, tmp_path / "two", folder=tmp_path)
    assert tiny.differing(first[0], expected) == tiny.differing(second[0], expected) == []
    assert first[1] == second[1] == checkpoints


# ---- Gradients that are taken away, and weights that a pass changes ----


class Cancelled(Trainer):
    """Drops the gradient of the head after backward, as DINO does in its first epoch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        for param in model.classifier.parameters():
            param.grad = None
        return loss


class SAMPaCancelled(SAMPaMixin, Cancelled):
    pass


@pytest.mark.distributed
def test_a_gradient_that_is_set_to_none_is_none(tmp_path):
    expected = train(tmp_path / "one", SAMPaCancelled)
    kept = {name: value for name, value in tiny.bert().state_dict().items() if name.startswith("classifier")}
    assert tiny.differing({name: expected["weights"][name] for name in kept}, kept) == []
    check_two_and_plain(tmp_path, SAMPaCancelled, Cancelled, expected)


class LateCancelled(SAMPaTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step == 2:
            model.classifier.weight.grad = None
        return loss


def test_one_that_is_taken_away_once_it_was_sent_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="was set to None after it had been sent.*set overlap_exchange=False"):
        train(tmp_path, LateCancelled)
    assert train(tmp_path, LateCancelled, overlap_exchange=False)["steps"] == 5


class Prototypes(nn.Module):
    """Keeps the rows of a trained weight at length one, as SwAV does."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.bert()

    def forward(self, input_ids, labels):
        with torch.no_grad():
            weight = self.inner.classifier.weight
            weight.copy_(nn.functional.normalize(weight))
        outputs = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": outputs.loss, "logits": outputs.logits}


class MaxNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny.bert()
        self.inner.bert.embeddings.word_embeddings.max_norm = 1.0

    forward = Prototypes.forward


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Prototypes, "training_step changed 'inner.classifier.weight'.* in a callback, as on_step_end"),
        (MaxNorm, "'inner.bert.embeddings.word_embeddings', a Embedding with max_norm, normalises its weight"),
    ],
)
def test_a_pass_that_changes_a_trained_weight_is_refused(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=model)


class Restored(Trainer):
    """Adversarial training on the embeddings (FGM): moves them, goes backward again, and moves them back."""

    put_back = "into its memory"

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        weight = model.bert.embeddings.word_embeddings.weight
        kept = weight.data.clone()
        weight.data.add_(weight.grad / weight.grad.norm())
        super().training_step(model, inputs, num_items_in_batch)
        if self.put_back == "into its memory":
            weight.data.copy_(kept)
        else:
            weight.data = kept
        return loss


class SAMPaRestored(SAMPaMixin, Restored):
    pass


class SAMPaReplaced(SAMPaMixin, Restored):
    put_back = "other memory"


@pytest.mark.distributed
@pytest.mark.parametrize("trainer_class", [SAMPaRestored, SAMPaReplaced])
def test_one_that_puts_it_back_is_not(tmp_path, trainer_class):
    check_two_and_plain(tmp_path, trainer_class, Restored, train(tmp_path / "one", trainer_class))


class Domain(nn.Module):
    """Cannot be at half of its weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = tiny.bert(), nn.Parameter(torch.ones(()))

    def forward(self, input_ids, labels):
        assert self.scale > 0.8, "out of the domain"
        outputs = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": outputs.loss * self.scale, "logits": outputs.logits}


@pytest.mark.parametrize("trainer_class", [SAMPaTrainer, Anchored])
def test_a_model_that_cannot_be_elsewhere(tmp_path, trainer_class):
    assert train(tmp_path, trainer_class, Domain)["steps"] == 5


def test_where_it_cannot_be_elsewhere_the_pass_in_between_is_at_its_weights(tmp_path):
    scales = tiny.Passes()

    class Watched(SAMPaTrainer):
        def compute_loss(self, model, *args, **kwargs):
            if self.sampa.rehearsing:
                scales(model.scale.item())
            return super().compute_loss(model, *args, **kwargs)

    train(tmp_path, Watched, Domain)
    assert scales.seen == [1.0, 0.5, 1.0, 1.0]


class Clamped(nn.Module):
    """Keeps its weights within bounds that they are far from."""

    def __init__(self):
        super().__init__()
        self.student = tiny.bert()

    def forward(self, input_ids, labels, attention_mask=None):
        with torch.no_grad():
            self.student.classifier.weight.clamp_(-100, 100)
        return self.student(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_writes_what_its_weights_hold_already_is_told_so_and_no_other(tmp_path, caplog):
    train(tmp_path / "plain")
    assert [record.message for record in caplog.records if record.name.startswith("hf_sampa")] == []
    train(tmp_path / "clamped", model=Clamped)
    (record,) = (record for record in caplog.records if record.name.startswith("hf_sampa"))
    assert "A pass writes to trained weights, if only what they hold already." in record.message


# ---- Attributes of odd kinds ----


class Phase(Enum):
    COLD, HOT = 1, 2


@dataclass(frozen=True)
class Record:
    loss: float


class Odd(SAMPaTrainer):
    """Members of an Enum, as values and as keys, frozen records, names with dots, and a helper that holds the trainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.phase, self.counts, self.records = Phase.COLD, {Phase.COLD: 0, Phase.HOT: 0}, []
        self.of_layers = defaultdict(list)
        self.names, self.labels = None, np.array(["negative", "positive"])
        setattr(self, "mean.of.losses", 0.0)
        self.helper = Helper(self)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.counts[self.phase] += 1
        self.records.append(Record(loss.item()))
        self.of_layers["last"].append(loss.item())
        setattr(self, "mean.of.losses", 0.5 * getattr(self, "mean.of.losses") + loss.item())
        self.names = [*(self.names or []), str(len(self.records))]
        self.phase = Phase.HOT
        self.helper.calls += 1
        return loss * (1 + 0.01 * self.counts[Phase.HOT] + 0.1 * getattr(self, "mean.of.losses"))


class Helper:
    def __init__(self, trainer):
        self.trainer, self.calls = trainer, 0


def odd(trainer):
    same = trainer.phase is Phase.HOT and str(Phase.COLD) == "Phase.COLD" and trainer.helper.trainer is trainer
    kept = [record.loss for record in trainer.records], trainer.names, trainer.helper.calls, dict(trainer.of_layers)
    return same, kept, trainer.counts[Phase.COLD], trainer.counts[Phase.HOT]


class NoneAtFirst(SAMPaTrainer):
    """A teacher and an anchor that are None until the first pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = self.anchor = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
            self.anchor = [param.detach().clone() for param in model.parameters()]
        with torch.no_grad():
            taught = self.teacher(**inputs).logits
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + (model(**inputs).logits - taught).square().mean()


def none_at_first(trainer):
    return trainer.anchor, [param.detach() for param in trainer.teacher.parameters()]


class PlainWeight(SAMPaTrainer):
    """A trained tensor that is no Parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_sigma = torch.zeros(2, requires_grad=True)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.add_param_group({"params": [self.log_sigma]})
        return optimizer

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * torch.exp(-self.log_sigma).sum() + self.log_sigma.sum()


ODD = {
    "odd": (Odd, tiny.bert, odd),
    "none": (NoneAtFirst, tiny.bert, none_at_first),
    "plain weight": (PlainWeight, tiny.bert, lambda trainer: trainer.log_sigma.detach()),
}


def all_odd(folder):
    return {name: train(folder / name, kind, model, watch=watch) for name, (kind, model, watch) in ODD.items()}


@pytest.mark.distributed
def test_attributes_of_odd_kinds(tmp_path):
    expected = all_odd(tmp_path / "one")
    same, kept, cold, hot = expected["odd"]["watched"]
    assert same and (cold, hot) == (1, 4) and len(kept[0]) == kept[2] == 5 and kept[1] == ["1", "2", "3", "4", "5"]
    first = [param.detach() for param in tiny.bert().parameters()]
    assert tiny.differing(expected["none"]["watched"], (first, first)) == []
    for outcome in run_ranks(all_odd, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(outcome, expected) == []


def test_odd_attributes_after_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "watch": odd}
    expected = train(tmp_path / "whole", Odd, **settings)
    resumed = train(tmp_path / "again", Odd, resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert tiny.differing(tiny.comparable(resumed), tiny.comparable(expected)) == []
    assert not (tmp_path / "whole" / "checkpoint-6").exists() and (tmp_path / "again" / "checkpoint-5").exists()


class BecomesTensor(Normalised):
    mean = None

    def __init__(self):
        super().__init__()
        self.mean = 1.0

    def forward(self, input_ids, labels):
        outputs = self.inner(input_ids=input_ids, labels=labels)
        self.mean = 0.9 * self.mean + 0.1 * outputs.loss.detach()
        return {"loss": outputs.loss / self.mean, "logits": outputs.logits}


def test_a_number_that_becomes_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected 'model .mean' to stay what it is, a float.*or register a buffer"):
        train(tmp_path, model=BecomesTensor)
