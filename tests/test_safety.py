"""P7, P8, P9: who sees which weights, and what a checkpoint is good for."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, ViTForImageClassification

from hf_sampa import SAMPaTrainer
from hf_sampa.checkpoints import checkpoint
from tests import tiny


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


class Failing(SAMPaTrainer):
    """Raises in the given forward pass of the run, or in the backward pass after it."""

    fail_at, in_backward = 6, False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = tiny.Passes()

    @property
    def seen(self):
        """The weights in the pass that failed."""
        return self.passes.seen[-1]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.sampa.rehearsing or self.passes(weights(model)) != self.fail_at:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not self.in_backward:
            raise KeyboardInterrupt("in forward")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss.register_hook(self._raise)
        return loss

    def _raise(self, grad):
        raise KeyboardInterrupt("in backward")


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("fail_at", [6, 7], ids=["perturbed", "look-ahead"])
@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_after_an_exception_the_model_holds_x_t(tmp_path, method, fail_at, in_backward):
    """P7. The start rule takes pass 1, steps 1 and 2 passes 2 to 5."""
    recorder = tiny.Recorder()
    trainer = Failing(
        model=tiny.bert(0.1),
        args=tiny.arguments(tmp_path, method=method),
        train_dataset=tiny.sentences(16),
        callbacks=[recorder],
    )
    trainer.fail_at, trainer.in_backward = fail_at, in_backward
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert tiny.differing(weights(trainer.model), recorder.weights[-1]) == []
    if method == "sampa":
        assert tiny.differing(trainer.seen, recorder.weights[-1]) != []


class Watcher(TrainerCallback):
    """Compares the weights at every event with those after the last step."""

    def __init__(self):
        self.last, self.events, self.displaced = None, set(), []

    def on_event(self, event, args, state, control, model=None, **kwargs):
        if model is None:
            return
        if event in ("on_train_begin", "on_optimizer_step"):
            self.last = weights(model)
        self.events.add(event)
        if tiny.differing(weights(model), self.last):
            self.displaced.append(event)


for name in [
    name for name in dir(TrainerCallback) if name.startswith("on_") and name not in ("on_event", "on_init_end")
]:
    setattr(
        Watcher,
        name,
        lambda self, args, state, control, _name=name, **kwargs: self.on_event(_name, args, state, control, **kwargs),
    )


def test_everything_outside_a_step_sees_x_t(tmp_path):
    """P8: callbacks, evaluation inside training, and what is saved."""
    watcher, recorder, seen = Watcher(), tiny.Recorder(), []

    def compute_metrics(prediction):
        seen.append(weights(trainer.model))
        return {}

    trainer = SAMPaTrainer(
        model=tiny.bert(0.1),
        args=tiny.arguments(
            tmp_path,
            rho=1.0,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
        ),
        train_dataset=tiny.sentences(18),
        eval_dataset=tiny.sentences(6),
        callbacks=[watcher, recorder],
        compute_metrics=compute_metrics,
    )
    trainer.train()
    assert {
        "on_substep_end",
        "on_pre_optimizer_step",
        "on_evaluate",
        "on_save",
        "on_log",
        "on_step_end",
    } <= watcher.events
    assert watcher.displaced == []
    assert len(seen) == len(recorder.weights) == 6
    assert tiny.differing(seen, recorder.weights) == []
    for step, expected in enumerate(recorder.weights, start=1):
        saved = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert tiny.differing(weights(saved), expected) == []


WITHOUT_US = """
import sys
import weakref
sys.modules["hf_sampa"] = None  # importing it is an error
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

folder, output_dir = sys.argv[1:]
items = [{"input_ids": torch.arange(i, i + 8), "labels": i % 2} for i in range(16)]
args = TrainingArguments(
    output_dir, max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
    optim="adamw_torch", weight_decay=0.01, logging_steps=1,
)
trainer = Trainer(AutoModelForSequenceClassification.from_pretrained(folder), args, train_dataset=items)
trainer.train(resume_from_checkpoint=folder)
steps = {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()}
print("resumed", trainer.state.global_step, steps)
"""


def test_checkpoints_serve_those_without_this_package(tmp_path):
    """P9: plain transformers loads the model, plain Trainer continues with optimizer.pt."""
    args = tiny.arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16)).train()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(tmp_path / "checkpoint-4"), str(tmp_path / "plain")],
        capture_output=True,
        text=True,
    )
    assert "resumed 6 {6}" in done.stdout, done.stderr


def test_a_checkpoint_of_plain_trainer_can_be_continued(tmp_path, caplog):
    args = tiny.arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(18)).train()
    trainer = SAMPaTrainer(model=tiny.bert(seed=5), args=args, train_dataset=tiny.sentences(18))
    with tiny.transformers_log(caplog):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert "holds no state of SAMPa, as plain Trainer leaves it: g_t is computed at its weights" in caplog.text
    assert {int(s["step"]) for s in trainer.optimizer.state_dict()["state"].values()} == {4}


def test_saved_where_a_run_of_plain_trainer_is_continued(tmp_path):
    """Before the stream is open the place is Trainer's: two steps of two micro-batches."""
    args = tiny.arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    Trainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(20)).train()

    class Saves(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer._save_checkpoint(trainer.model, trial=None)

    trainer = SAMPaTrainer(tiny.bert(), args, train_dataset=tiny.sentences(20), callbacks=[Saves()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    position = checkpoint.read(tmp_path / "checkpoint-2").position
    assert (position.epoch, position.start) == (0, 4)


@pytest.mark.parametrize("wrote", [Trainer, SAMPaTrainer])
def test_the_state_of_another_optimizer_is_refused(tmp_path, wrote):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    wrote(tiny.bert(), tiny.arguments(tmp_path, **settings), train_dataset=tiny.sentences(18)).train()
    args = tiny.arguments(tmp_path, optim="sgd", optim_args="momentum=0.9", **settings)
    whose = "another optimizer" if wrote is Trainer else "AdamW"
    with pytest.raises(ValueError, match=f"Expected the state of SGD in .*, but it is that of {whose}. Resume with"):
        SAMPaTrainer(tiny.bert(), args, train_dataset=tiny.sentences(18)).train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("model", [tiny.bert, tiny.vit], ids=["bert", "vit"])
def test_resume_loads_every_tensor(tmp_path, model):
    """Upstream leaves most of ViT's tensors as they were and only warns (transformers #43701)."""
    dataset = tiny.sentences(16) if model is tiny.bert else tiny.images(16)
    args = tiny.arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    recorder = tiny.Recorder()
    SAMPaTrainer(model=model(), args=args, train_dataset=dataset, callbacks=[recorder]).train()
    resumed = SAMPaTrainer(model=model(seed=5), args=args, train_dataset=dataset)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.differing(weights(resumed.model), recorder.weights[-1]) == []


@pytest.mark.parametrize("model", [tiny.bert, tiny.vit], ids=["bert", "vit"])
def test_the_best_model_is_loaded_to_the_last_tensor(tmp_path, model):
    dataset = tiny.sentences(16) if model is tiny.bert else tiny.images(16)
    recorder, ratings = tiny.Recorder(), iter([0.1, 0.9, 0.2, 0.3])
    trainer = SAMPaTrainer(
        model=model(),
        args=tiny.arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="rating",
            greater_is_better=True,
        ),
        train_dataset=dataset,
        eval_dataset=dataset[:4],
        callbacks=[recorder],
        compute_metrics=lambda prediction: {"rating": next(ratings)},
    )
    trainer.train()
    assert tiny.differing(weights(trainer.model), recorder.weights[1]) == []
    assert tiny.differing(weights(trainer.model), recorder.weights[3]) != []
    trainer.save_model()
    loader = BertForSequenceClassification if model is tiny.bert else ViTForImageClassification
    assert tiny.differing(weights(loader.from_pretrained(tmp_path)), recorder.weights[1]) == []


def test_random_states_of_the_user_are_left_alone(tmp_path):
    """A step draws its own numbers and gives the global generators back."""
    states = []

    class State(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(torch.get_rng_state())

    args = tiny.arguments(tmp_path, max_steps=3)
    SAMPaTrainer(model=tiny.bert(0.5), args=args, train_dataset=tiny.sentences(16), callbacks=[State()]).train()
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])


SECOND_RUNS = [("sampa", "sam"), ("sam", "sam"), ("sampa", "msam"), ("sam", "msam")]


@pytest.mark.parametrize(("method", "variant"), SECOND_RUNS)
def test_a_second_run_frees_what_the_first_one_held(tmp_path, method, variant):
    """Before it takes memory of its own, and without waiting for Python's collector."""
    args = tiny.arguments(tmp_path, method=method, variant=variant, max_steps=2)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    trainer.train()
    held = weakref.ref(trainer.sampa.perturbed_grads)
    gc.collect()
    gc.disable()
    try:
        trainer._run.make_room()
        assert held() is None
    finally:
        gc.enable()
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_run_that_is_refused_leaves_the_one_before_to_be_saved(tmp_path):
    trainer = SAMPaTrainer(
        model=tiny.bert(), args=tiny.arguments(tmp_path, max_steps=2), train_dataset=tiny.sentences(16)
    )
    trainer.train()
    trainer.train_dataset = []
    with pytest.raises(ValueError, match="Expected a training dataset of at least one sample"):
        trainer.train()
    trainer._save_checkpoint(trainer.model, None)
    assert (tmp_path / "checkpoint-2" / "sampa.safetensors").exists()


def test_what_may_be_asked_before_a_run(tmp_path):
    trainer = SAMPaTrainer(model=tiny.bert(), args=tiny.arguments(tmp_path), train_dataset=tiny.sentences(8))
    assert trainer.sampa is trainer.lookahead_error() is trainer.seconds_per_step is None
    assert (trainer.weights_step, trainer.unlogged_means()) == (0, {})
    with trainer.aside():
        pass
