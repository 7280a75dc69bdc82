"""What forward changes besides its outputs: from one pass per update batch, the same on all processes and after a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_sampa import SAMPaTrainer
from hf_sampa.distributed.exchange import Exchange
from hf_sampa.distributed.roles import Mesh
from hf_sampa.state.forward_state import TRIAL_PASSES, ForwardState
from hf_sampa.state.tensors_of import SMALL
from tests import tiny
from tests.ranks import run_ranks


class Head(nn.Module):
    """Part of all models here: a head on flat images, and a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 3)

    def forward(self, pixel_values, labels=None):
        pixels = pixel_values.flatten(1)
        if self.training:
            with torch.no_grad():
                self.move(pixels, labels)
        logits = self.head(pixels + self.shift())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def shift(self):
        return 0.0


class Queue(Head):
    """A buffer that fills with what was seen, and is replaced by one of another size."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(0, 64))

    def move(self, pixels, labels):
        self.queue = torch.cat([self.queue, pixels])[-10:]

    def shift(self):
        return self.queue.mean(0) if len(self.queue) else 0.0


class Unsaved(Queue):
    """The same, in no checkpoint."""

    def __init__(self):
        Head.__init__(self)
        self.register_buffer("queue", torch.zeros(0, 64), persistent=False)


class Appearing(Head):
    """A buffer that is None, and one that is not there, until the first pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def move(self, pixels, labels):
        self.mean = pixels.mean(0) if self.mean is None else self.mean.lerp(pixels.mean(0), 0.1)
        if "count" not in self._buffers:
            self.register_buffer("count", torch.zeros(()), persistent=False)
        self.count += 1

    def shift(self):
        return 0.0 if self.mean is None else self.mean + self.count


class Teacher(Head):
    """A frozen copy of the head that follows it, by one of the ways in which such copies are written."""

    def __init__(self, way):
        super().__init__()
        self.way, self.teacher = way, nn.Linear(64, 3).requires_grad_(False)

    def move(self, pixels, labels):
        for own, followed in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            if self.way == "in place":
                own.lerp_(followed, 0.1)
            elif self.way == "data in place":
                own.data.mul_(0.9).add_(followed.data, alpha=0.1)
            else:
                own.data = own.data * 0.9 + followed.data * 0.1

    def shift(self):
        return self.teacher.weight.mean(0)


class Large(Teacher):
    """A teacher with more entries than are copied before every pass."""

    def __init__(self):
        super().__init__("data in place")
        self.teacher = nn.Linear(64, SMALL // 64 + 1).requires_grad_(False)

    def move(self, pixels, labels):
        for own in self.teacher.parameters():
            own.data.mul_(0.9).add_(self.head.weight.data.mean(), alpha=0.1)


MODELS = {
    "queue": Queue,
    "unsaved": Unsaved,
    "appearing": Appearing,
    "teacher": lambda: Teacher("in place"),
    "teacher by data": lambda: Teacher("data in place"),
    "teacher replaced": lambda: Teacher("replaced"),
    "large": Large,
}


def train(folder, name, resume=None, **changes):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lmbda": 0.5, **changes}
    trainer = SAMPaTrainer(MODELS[name](), tiny.arguments(folder, **settings), train_dataset=tiny.images(18))
    outcome = tiny.outcome(trainer, resume)
    buffers = {key: value.clone() for key, value in trainer.model.named_buffers()}
    return {**outcome, "buffers": buffers}


def all_models(folder, **changes):
    return {name: train(folder / name, name, **changes) for name in MODELS}


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_two_processes_are_one(tmp_path, method):
    settings = {"method": method} if method == "sampa" else {"method": method, "per_device_train_batch_size": 2}
    outcomes = run_ranks(all_models_of, 2, tmp_path / "two", settings, folder=tmp_path)
    assert tiny.differing(outcomes[0]["weights"], outcomes[1]["weights"]) == []
    if method == "sampa":
        assert tiny.differing(outcomes[0], flat(all_models(tmp_path / "one"))) == []


def all_models_of(folder, settings):
    return flat(all_models(folder, **settings))


def flat(outcomes):
    return {key: {name: each[key] for name, each in outcomes.items()} for key in ("weights", "buffers", "logs")}


@pytest.mark.parametrize("name", MODELS)
def test_from_one_pass_per_update_batch(tmp_path, name):
    """With rho = lambda = 0 and a step size of 0, what forward saw of weights is x_0 in every pass: plain arithmetic."""
    trainer = SAMPaTrainer(
        MODELS[name](),
        tiny.arguments(
            tmp_path, max_steps=3, rho=0.0, lmbda=0.0, learning_rate=0.0, train_sampling_strategy="sequential"
        ),
        train_dataset=tiny.images(18),
    )
    trainer.train()
    expected = MODELS[name]().train()
    images = torch.stack([item["pixel_values"] for item in tiny.images(18)])
    for start in range(0, 16, 4):  # B_0 to B_3: g_3 is carried
        with torch.no_grad():
            expected.move(images[start : start + 4].flatten(1), None)
    found = {**dict(trainer.model.named_buffers()), **dict(trainer.model.named_parameters())}
    wanted = {**dict(expected.named_buffers()), **dict(expected.named_parameters())}
    assert tiny.differing(found, wanted) == []


@pytest.mark.parametrize("name", MODELS)
def test_resumed_is_never_stopped(tmp_path, name):
    whole = train(tmp_path, name)
    resumed = train(tmp_path / "again", name, str(tmp_path / "checkpoint-3"))
    assert tiny.differing(tiny.comparable(resumed), tiny.comparable(whole)) == []


def test_the_best_model_has_the_buffers_of_its_step(tmp_path):
    """Of another size than the last step's."""
    model = Queue()
    args = tiny.arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer = SAMPaTrainer(
        model, args, train_dataset=tiny.images(18), eval_dataset=tiny.images(4), compute_metrics=Falling()
    )
    args.metric_for_best_model = "steps_left"
    args.greater_is_better = True
    trainer.train()
    assert trainer.state.best_global_step == 1 and model.queue.shape == (8, 64)


class Falling:
    """A metric by which the first evaluation is the best."""

    def __init__(self):
        self.left = 10

    def __call__(self, predictions):
        self.left -= 1
        return {"steps_left": self.left}


class Late(Large):
    """A teacher that begins to move after some passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def move(self, pixels, labels):
        self.passes += 1
        if self.passes > 3:
            self.teacher.weight.mul_(0.9)


def test_what_begins_to_change_too_late_to_be_undone_ends_the_run(tmp_path):
    with pytest.raises(
        RuntimeError, match="'teacher.weight', a buffer or frozen parameter of 65600 entries, changed for"
    ):
        tiny.run(tmp_path, Late(), tiny.images(18), max_steps=6)


def test_what_does_not_move_is_not_written_to():
    """Autograd would take that for a change of what it keeps; references and memory are what they were."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_buffer("table", torch.arange(4.0))
    state = ForwardState({"": model}, list(model.parameters()), Exchange(Mesh(1, 0, paired=False)))
    mean, versions = model[0].running_mean, (model.table._version, model[0].running_mean._version)
    before = mean.clone()
    with state.kept(), state.noted():
        model(torch.randn(8, 3))
    assert state.moving == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert model[0].running_mean is mean and torch.equal(mean, before)
    assert model.table._version == versions[0] and mean._version > versions[1]


def held_by_every_kind():
    """Tensors of several types, one of them with a NaN, one strided, one repeated; nothing is trained but a bias."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    tensors = {
        "whole": torch.arange(4),
        "short": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "eight bits": torch.ones(5).to(torch.float8_e4m3fn),
        "truths": torch.tensor([True, False]),
        "no number": torch.tensor([float("nan"), 0.0]),
        "strided": torch.zeros(4, 3).t(),
        "repeated": torch.zeros(1, 3).expand(4, 3),
        "empty": torch.zeros(0),
    }
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    model.register_buffer("to come", None)
    return model


def replaced(name):
    def change(model):
        setattr(model, name, getattr(model, name).clone())

    return change


def elsewhere(model):
    model.strided.data = model.strided.data.clone()


def exchanged(model):
    own = model._buffers
    own["whole"], own["truths"] = own["truths"], own["whole"]


CHANGES = {
    "nothing": (lambda model: None, set()),
    "a version": (lambda model: model.short.add_(1), {"short"}),
    "a version, no number": (lambda model: model.short.add_(0), {"short"}),
    "a sign of zero": (lambda model: getattr(model, "no number").data[1:].neg_(), {"no number"}),
    "complex": (lambda model: model.complex.data.mul_(2), {"complex"}),
    "eight bits": (lambda model: getattr(model, "eight bits").data.view(torch.uint8).add_(1), {"eight bits"}),
    "a truth": (lambda model: model.truths.data.logical_not_(), {"truths"}),
    "a frozen weight": (lambda model: model[1].weight.data.mul_(2), {"1.weight"}),
    "a trained one": (lambda model: model[1].bias.data.mul_(2), set()),
    "strided": (lambda model: model.strided.data[0].add_(1), {"strided"}),
    "elsewhere": (elsewhere, {"strided"}),
    "another object": (replaced("whole"), {"whole"}),
    "an empty one": (replaced("empty"), {"empty"}),
    "places": (exchanged, {"whole", "truths"}),
    "one that was to come": (lambda model: setattr(model, "to come", torch.ones(1)), {"to come"}),
    "a new one": (lambda model: model[0].register_buffer("new", torch.ones(1)), {"0.new"}),
    "one that goes": (lambda model: delattr(model, "whole"), set()),
    "running statistics": (
        lambda model: model[0](torch.randn(8, 3)),
        {"0.running_mean", "0.running_var", "0.num_batches_tracked"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_pass_changes_is_seen_after_many_that_changed_nothing(change):
    """Also by ways that leave no version behind, in tensors that were found to be the same again and again."""
    model = held_by_every_kind()
    state = ForwardState({"": model}, [model[1].bias, *model[0].parameters()], Exchange(Mesh(1, 0, paired=False)))
    for _ in range(TRIAL_PASSES + 2):
        with state.noted():
            pass
    assert state.moving == set()
    make, expected = CHANGES[change]
    with state.noted():
        make(model)
    assert state.moving == expected
    with state.noted():
        pass
    assert state.moving == expected
