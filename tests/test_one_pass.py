"""Both gradients in one pass: the same bits as passes in turn, whatever is trained and however the batches are."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from peft import IA3Config, PromptTuningConfig
from torch import nn
from transformers import (
    TrainerCallback,
)

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.one_pass.halves import Halves
from tests import tiny
from tests.adapted import QUANTIZED, Rows, bert, gpt2, llama, lora, quantized_llama
from tests.ecosystem import models, runs
from tests.ecosystem.trl_cases import CASES


# Of peft, and of transformers from 5.23 on.
pytestmark = pytest.mark.filterwarnings("default:.*gradient_checkpointing.* is deprecated:FutureWarning")


def half_llama():
    """A model in half precision, its adapters in single."""
    model = llama()
    for param in model.parameters():
        param.data = param.data if param.requires_grad else param.data.bfloat16()
    return model


def run(folder, model, concurrent, rows=None, trainer_class=SAMPaTrainer, callbacks=(), resume=None, **settings):
    """The trainer after eight steps, its trained weights and its log."""
    rows = rows or Rows()
    args = SAMPaTrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "concurrent": concurrent,
            **settings,
        },
    )
    trainer = trainer_class(model, args, train_dataset=rows, data_collator=rows.collate, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
    log = [
        {name: value for name, value in line.items() if "runtime" not in name and "per_second" not in name}
        for line in trainer.state.log_history
    ]
    return trainer, weights, log


def one_pass(trainer):
    return trainer._run.steps.engine.one_pass


@pytest.mark.parametrize(
    ("model", "settings", "at_blocks"),
    [
        (bert, {}, True),
        (bert, {"rows": Rows(ragged=True)}, True),
        (bert, {"gradient_accumulation_steps": 2, "rows": Rows(ragged=True)}, True),
        (bert, {"gradient_checkpointing": True}, False),
        (bert, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, False),
        (bert, {"bf16": True}, True),
        (half_llama, {"rows": Rows(causal=True)}, True),
        (bert, {"lmbda": 0}, True),
        (bert, {"variant": "asam"}, True),
        (bert, {"variant": "vasso"}, True),
        (bert, {"variant": "functional_sam", "gradient_accumulation_steps": 2}, True),
        (llama, {"variant": "functional_sam", "rows": Rows(ragged=True, causal=True)}, True),
        (lambda: bert(lora(use_dora=True)), {}, True),
        (lambda: bert(lora(target_modules=["query", "dense"], bias="all")), {}, True),
        (lambda: bert(IA3Config(task_type="SEQ_CLS", target_modules=["value"], feedforward_modules=[])), {}, True),
        (lambda: bert(PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)), {}, True),
        (gpt2, {"rows": Rows(causal=True)}, True),
        (llama, {"rows": Rows(causal=True)}, True),
        (llama, {"rows": Rows(ragged=True, causal=True)}, True),
    ],
    ids=[
        *("one length", "several lengths", "accumulation", "checkpointing", "reentrant checkpointing", "bf16", "bf16 weights", "lambda 0"),
        *("asam", "vasso", "functional", "functional, every token", "DoRA", "biases", "IA3", "prompts", "GPT-2", "Llama", "Llama, several lengths"),
    ],
)  # fmt: skip
def test_the_bits_of_passes_in_turn(tmp_path, model, settings, at_blocks):
    _, in_turn, log = run(tmp_path / "in turn", model(), False, **settings)
    trainer, at_once, other_log = run(tmp_path / "at once", model(), True, **settings)
    found = one_pass(trainer)
    assert found.on and found.exact and found.meetings.at_blocks == at_blocks
    assert found.halves.meetings > 8 * 2
    assert all(torch.equal(at_once[name], each) for name, each in in_turn.items())
    assert log == other_log
    # And the model is as it was.
    assert not any(
        "forward" in vars(each) for each in trainer.model.modules() if type(each).__module__.startswith("torch")
    )
    assert torch.nn.functional.dropout.__name__ == "dropout"


def test_a_frozen_layer_is_computed_once_for_both(tmp_path, caplog):
    """And the log says so."""
    caplog.set_level(logging.INFO)
    rows_seen = []
    model = bert()
    layer = model.base_model.model.bert.encoder.layer[2].output.dense
    layer.register_forward_pre_hook(lambda module, args: rows_seen.append(len(args[0])))
    run(tmp_path, model, True, max_steps=4)
    # g_0, the step that is tried both ways, three others.
    assert rows_seen[-3:] == [8, 8, 8]
    assert caplog.text.count("concurrent: both gradients of a step are taken in one pass from here on.") == 1


class Counting(SAMPaTrainer):
    """Keeps what its losses were, and reads it again."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses, self.calls, self.before = [], 0, None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        self.before = self.calls
        found = super().compute_loss(model, inputs, *args, **kwargs)
        assert self.calls == self.before
        loss = found[0] if isinstance(found, tuple) else found
        self.losses.append(loss.item())
        return found


def test_what_is_kept_on_the_trainer_is_kept_once(tmp_path):
    in_turn, weights, _ = run(tmp_path / "in turn", bert(), False, trainer_class=Counting)
    at_once, others, _ = run(tmp_path / "at once", bert(), True, trainer_class=Counting)
    assert at_once.losses == in_turn.losses and at_once.calls == in_turn.calls == 8
    assert all(torch.equal(others[name], each) for name, each in weights.items())
    assert one_pass(at_once).on and one_pass(at_once).halves.meetings > 6


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_resumed_it_is_the_same_run(tmp_path):
    _, whole, _ = run(tmp_path / "whole", bert(), True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", bert(), True, callbacks=[Killed()], save_strategy="steps", save_steps=2)
    _, resumed, _ = run(tmp_path / "killed", bert(), True, resume=True, save_strategy="steps", save_steps=2)
    assert all(torch.equal(resumed[name], each) for name, each in whole.items())


class Stateful(nn.Module):
    """A block whose forward moves a buffer."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *args, **kwargs):
        self.count += 1
        return self.block(*args, **kwargs)


class Leaving(nn.Module):
    """A block that leaves something for the head of the same pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, *args, **kwargs):
        found = self.block(hidden_states, *args, **kwargs)
        self.left = found[0, 0]
        return found


@pytest.mark.parametrize(
    ("wrapper", "why"),
    [
        (Stateful, "forward changes 'base_model.model.bert.encoder.layer.1.count'"),
        (Leaving, "it gives other gradients"),
    ],
)
def test_where_it_would_be_another_step_passes_are_taken_in_turn(tmp_path, caplog, wrapper, why):
    def model():
        made = bert()
        layers = made.base_model.model.bert.encoder.layer
        layers[1] = wrapper(layers[1])
        if wrapper is Leaving:
            made.base_model.model.dropout.register_forward_pre_hook(lambda module, args: (args[0] + layers[1].left,))
        return made

    _, weights, _ = run(tmp_path / "in turn", model(), False)
    with caplog.at_level(logging.WARNING):
        trainer, others, _ = run(tmp_path / "at once", model(), True)
    assert not one_pass(trainer).on and why in one_pass(trainer).why
    assert caplog.text.count("concurrent: both gradients of a step cannot be taken in one pass here, because") == 1
    assert all(torch.equal(others[name], each) for name, each in weights.items())


def test_variants_of_more_gradients_take_passes_in_turn(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, others, _ = run(tmp_path / "at once", bert(), True, variant="msam")
    _, weights, _ = run(tmp_path / "in turn", bert(), False, variant="msam")
    assert "because this variant takes more than two gradients. They are taken in turn" in caplog.text
    assert all(torch.equal(others[name], each) for name, each in weights.items())


def test_an_error_in_one_half_is_the_run_s(tmp_path):
    class Failing(SAMPaTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            found = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 3 and threading.current_thread() is not threading.main_thread():
                raise FileNotFoundError("the teacher")
            return found

    model, kept = bert(), {}

    class Keeping(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kept.update({name: each.detach().clone() for name, each in model.named_parameters()})

    with pytest.raises(FileNotFoundError, match="the teacher"):
        run(tmp_path, model, True, trainer_class=Failing, callbacks=[Keeping()])
    assert all(torch.equal(kept[name], each) for name, each in model.named_parameters())
    assert torch.nn.functional.dropout.__name__ == "dropout"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "sam"}, "concurrent: expected method='sampa', got 'sam', whose second gradient needs the first"),
        ({"torch_compile": True}, "concurrent: expected torch_compile=False"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        SAMPaTrainingArguments(output_dir=str(tmp_path), concurrent=True, use_cpu=True, report_to=[], **settings)


def test_a_model_that_is_trained_whole_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="concurrent: expected a model with frozen linear layers, .* Leave concurrent out"
    ):
        run(tmp_path, tiny.bert(), True)


# ---- Quantized models ----


@pytest.mark.parametrize("ragged", [False, True], ids=["one length", "several lengths"])
@pytest.mark.parametrize("quantized", QUANTIZED)
def test_adapters_on_a_quantized_model(tmp_path, quantized, ragged):
    """QLoRA."""
    model = quantized_llama(tmp_path / "base", quantized())
    rows = Rows(ragged=ragged, causal=True)
    _, in_turn, log = run(tmp_path / "in turn", model(), False, rows=rows)
    trainer, at_once, other_log = run(tmp_path / "at once", model(), True, rows=rows)
    assert one_pass(trainer).on
    assert tiny.differing([in_turn, log[:-1]], [at_once, other_log[:-1]]) == []


# ---- Trainers of other libraries ----


@pytest.mark.parametrize("samples", [14, 32])
def test_trl_with_adapters(tmp_path, samples):
    """Its entropy, its accuracy and its tokens, too."""
    case = next(each for each in CASES if each.title == "LoRA by peft_config")
    models.write(tmp_path)
    found = []
    for concurrent in (False, True):
        trainer = runs.make(case, tmp_path, tmp_path / "out", samples=samples, concurrent=concurrent)
        found.append(runs.outcome(trainer))
    assert one_pass(trainer).on
    assert len(found[0]["training"]) > 2 and "entropy" in found[0]["training"][0]
    assert tiny.differing(*({**each, "held": None, "logs": None} for each in found)) == []


# ---- Halves ----


class Turn:
    """What belongs to a half: whose turn it is."""

    def __init__(self):
        self.entered = None

    def leave(self, half):
        pass

    def enter(self, half):
        self.entered = half


def test_halves_meet_in_the_order_of_their_places():
    halves, turn, said = Halves(torch.device("cpu")), Turn(), []

    def half(number, places):
        found = []
        for place in places:
            assert turn.entered == number and halves.current == number
            said.append((number, place))
            found.append(halves.meet(place, (number, place), lambda one, other: (f"{one}{other}", f"{other}{one}")))
        return found

    first, second = halves.run(lambda: half(0, "abcd"), lambda: half(1, "acd"), [turn])
    # The second one passes b by, so that nothing meets until it waits at a place to which the first one comes.
    assert first[0] == "(0, 'a')(1, 'a')" and second[0] == "(1, 'a')(0, 'a')"
    assert len(first) == 4 and len(second) == 3 and halves.meetings >= 1
    assert said[:2] == [(0, "a"), (1, "a")] and halves.current is None and turn.entered == 0
    assert halves.run(lambda: half(0, ""), lambda: half(1, "a"), [turn]) == ([], [None])
    halves.close()


@pytest.mark.parametrize("broken", [0, 1])
def test_an_exception_ends_both(broken):
    halves, ended = Halves(torch.device("cpu")), []

    def half(number):
        try:
            halves.meet("a", None, lambda one, other: (1, 1))
            if number == broken:
                raise KeyError("mine")
            halves.meet("b", None, lambda one, other: (1, 1))
            halves.meet("c", None, lambda one, other: (1, 1))
        finally:
            ended.append(number)

    with pytest.raises(KeyError, match="mine"):
        halves.run(lambda: half(0), lambda: half(1), [])
    assert sorted(ended) == [0, 1]
    assert halves.run(lambda: 1, lambda: 2, []) == (1, 2)
    halves.close()
