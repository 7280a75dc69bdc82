"""What the diagnostics measure, and that no run is another one for being measured."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from transformers import TrainerCallback

from hf_sampa import DiagnosticsCallback, SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.finetuning import BaselineTrainer, FineTuningArguments
from tests import models, sharded, tiny
from tests.division import divided, divided_tuples
from tests.ranks import run_ranks


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's
]

OF_THE_LOOKAHEAD = {"lookahead_cosine", "lookahead_distance"}
HELD_OUT = {"held_out_loss", "held_out_sharpness", "hessian_eigenvalue"}
OF_ROUNDED_WEIGHTS = {"displacement_length", "displacement_cosine"}
SENTENCES = {"model": partial(tiny.bert, 0.1), "dataset": tiny.sentences(19), "held_out": tiny.sentences(8, seed=2)}
IMAGES = {"dataset": tiny.images(19), "held_out": tiny.images(8, seed=2)}
CASES = {
    "dropout, accumulation": {**SENTENCES, "gradient_accumulation_steps": 2},
    "batch norm": {**IMAGES, "model": tiny.BatchNormNet},
    "buffers of its own": {**IMAGES, "model": models.Drifting},
    "reentrant checkpointing": {**SENTENCES, **models.CHECKPOINTED_REENTRANT},
    "adapters": {**SENTENCES, "model": models.lora_bert},
    "bf16": {**SENTENCES, "bf16": True},
    "SAM": {**SENTENCES, "method": "sam"},
    "AdamW": {**SENTENCES, "method": "adamw", "gradient_accumulation_steps": 2},
    "AdamW, batch norm": {**IMAGES, "method": "adamw", "model": tiny.BatchNormNet},
    "AdamW, buffers of its own": {**IMAGES, "method": "adamw", "model": models.Drifting},
    "mSAM": {**SENTENCES, "variant": "msam", "variant_args": {"size": 2}},
    "stable SAM": {**SENTENCES, "variant": "stable_sam"},
    "compiled": {**IMAGES, "dataset": tiny.images(16), "model": models.Perceptron, **models.COMPILED},
    "no held-out data": {**SENTENCES, "held_out": None},
    "several held-out datasets": {**SENTENCES, "held_out": {"a": tiny.sentences(8, seed=2), "b": tiny.sentences(4)}},
}


def train(folder, case, every, **changes):
    """A run, and apart from it what was measured, by step."""
    settings = {**CASES[case], "diagnostics_steps": every, **changes}
    held_out = settings.pop("held_out")
    settings["trainer_class"] = BaselineTrainer if settings.get("method") == "adamw" else SAMPaTrainer
    settings["trainer_kwargs"] = {"eval_dataset": held_out}
    with patch.object(SAMPaTrainingArguments, "METHODS", FineTuningArguments.METHODS):
        found = tiny.run(folder, settings.pop("model"), settings.pop("dataset"), **settings)
    measured = [line for line in found["logs"] if line.keys() & (OF_THE_LOOKAHEAD | HELD_OUT)]
    found["logs"] = [line for line in found["logs"] if line not in measured]
    return found, measured


# Others have these in them, or as much.
WHOLE = {"buffers of its own", "adapters", "bf16", "stable SAM", "AdamW, buffers of its own"}


@pytest.mark.parametrize("case", divided(CASES, WHOLE))
def test_the_training_is_the_same_bit_for_bit(tmp_path, case):
    plain, nothing = train(tmp_path / "plain", case, 0)
    found, measured = train(tmp_path / "measured", case, 3)
    assert nothing == []
    assert tiny.differing(tiny.comparable(found), tiny.comparable(plain)) == []
    steps = found["steps"]
    held_out = HELD_OUT if CASES[case]["held_out"] else set()
    if CASES[case].get("bf16"):
        held_out = held_out | OF_ROUNDED_WEIGHTS
    looks_ahead = case not in ("SAM", "mSAM") and not case.startswith("AdamW")
    expected = [(t, held_out | (OF_THE_LOOKAHEAD if looks_ahead and t else set())) for t in range(0, steps, 3)]
    expected += [(steps, held_out)]
    assert [(line["step"], line.keys() - {"step", "epoch"}) for line in measured] == [e for e in expected if e[1]]
    for line in measured:
        assert line.get("lookahead_cosine", 1.0) > 0.99
        assert line.get("held_out_sharpness", 1.0) > 0


ON_TWO = [(case, sharded) for case in ("dropout, accumulation", "batch norm") for sharded in (False, True)]


@pytest.mark.parametrize(("case", "sharded"), divided_tuples(ON_TWO, whole=ON_TWO[1:3]))
def test_two_processes_measure_what_one_does_and_train_the_same(tmp_path, case, sharded):
    changes = {"shard_optimizer": True} if sharded else {}
    plain, _ = train(tmp_path / "plain", case, 0)
    _, measured = train(tmp_path / "one", case, 3)
    for found, by_two in run_ranks(
        partial(train, case=case, every=3, **changes), 2, tmp_path / "two", folder=tmp_path
    ):
        if changes:  # each process has half of the optimizer's state
            found["optimizer"] = plain["optimizer"]
        of_both = [tiny.comparable({**each, "logs": tiny.without_cosine(each["logs"])}) for each in (found, plain)]
        assert tiny.differing(*of_both) == []
        for line, expected in zip(by_two, measured, strict=True):
            assert line == expected


def test_two_processes_of_the_baseline_measure_the_same_and_train_as_without(tmp_path):
    """On all of the batch, as one process does, and not on the part of it that an evaluation gives each."""
    run = partial(train, case="AdamW")
    plain = run_ranks(partial(run, every=0), 2, tmp_path / "plain", folder=tmp_path / "0")
    measured = run_ranks(partial(run, every=2), 2, tmp_path / "two", folder=tmp_path / "2")
    _, (before, *_) = run(tmp_path / "one", every=2)
    for (found, lines), (expected, _) in zip(measured, plain, strict=True):
        assert tiny.differing(tiny.comparable(found), tiny.comparable(expected)) == []
        assert lines == measured[0][1] and len(lines) > 2
        assert lines[0] == before


def test_at_one_radius_methods_are_measured_alike(tmp_path):
    """At the start, where all have the same weights, whatever their rho."""
    found = {
        (method, rho, radius): train(
            tmp_path, "batch norm", 4, method=method, rho=rho, diagnostics_radius=radius, max_steps=1
        )[1][0]["held_out_sharpness"]
        for method, rho, radius in [
            *(("adamw", 0.05, 0.1), ("sam", 0.1, 0.1), ("sampa", 0.2, 0.1)),
            *(("adamw", 0.1, None), ("sampa", 0.1, None), ("sampa", 0.1, 0.0), ("adamw", 0.1, 0.2)),
        ]
    }
    *alike, none, more = found.values()
    assert len(set(alike)) == 1 and none == 0 < alike[0] < more


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_without_the_eigenvalue_all_else_is_measured_the_same(tmp_path, method):
    run = partial(train, case="batch norm", every=2, method=method, max_steps=4)
    (whole, lines), (left_out, others) = run(tmp_path / "20"), run(tmp_path / "0", diagnostics_iterations=0)
    assert others == [{name: line[name] for name in line if name != "hessian_eigenvalue"} for line in lines] != lines
    assert tiny.differing(tiny.comparable(whole), tiny.comparable(left_out)) == []


@pytest.mark.parametrize("case", ["bf16", "SAM"])
def test_what_half_precision_leaves_of_the_displacement_is_measured_where_there_is_half_precision(tmp_path, case):
    """The toy has weights few enough for it to be nearly all."""
    _, lines = train(tmp_path, case, 2)
    for line in lines:
        if case == "bf16":
            assert 0.98 < line["displacement_cosine"] < 1 and line["displacement_length"] == pytest.approx(1, abs=0.02)
        else:
            assert not line.keys() & {"displacement_cosine", "displacement_length"}


def on_shards(folder):
    """What the baseline logs of a model in shards."""
    changes = {"method": "adamw", "max_steps": 2, "diagnostics_steps": 1, **sharded.FSDP}
    with patch.object(SAMPaTrainingArguments, "METHODS", FineTuningArguments.METHODS):
        args = tiny.arguments(folder, **changes)
    data = {"train_dataset": tiny.sentences(16), "eval_dataset": tiny.sentences(8, seed=2)}
    trainer = OnShards(model=tiny.bert(), args=args, **data)
    trainer.train()
    return trainer.state.log_history


class OnShards(sharded.AsOnGPU, BaselineTrainer): ...


@sharded.needs_versions
def test_of_shards_the_baseline_measures_nothing(tmp_path):
    for lines in run_ranks(on_shards, 2, tmp_path / "out", folder=tmp_path):
        assert len(lines) == 3 and not any("held_out_loss" in line for line in lines)


def test_replicas_measure_the_whole_update_batch(tmp_path):
    """Two pairs with half a batch each see what one process with the whole of it does, to rounding."""
    settings = {"model": tiny.bert, "dataset": tiny.sentences(16), "optim": "sgd", "learning_rate": 0.5, "lmbda": 0.0}
    _, measured = train(tmp_path / "one", "dropout, accumulation", 2, **settings)
    settings["per_device_train_batch_size"] = 2
    run = partial(train, case="dropout, accumulation", every=2, **settings)
    for _, by_four in run_ranks(run, 4, tmp_path / "four", folder=tmp_path):
        for line, expected in zip(by_four, measured, strict=True):
            assert line == pytest.approx(expected, rel=1e-3)


def test_a_resumed_run_measures_what_one_that_was_never_stopped_does(tmp_path):
    _, whole = train(tmp_path / "whole", "batch norm", 2, save_strategy="steps", save_steps=1)
    for step in (2, 3):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        _, resumed = train(tmp_path / "resumed", "batch norm", 2, resume=checkpoint)
        assert resumed == whole and len(whole) > 3


class Direct(TrainerCallback):
    """Computes the gradient at x_t once more, by itself, for a model without dropout."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        engine = self.trainer.sampa
        if engine.ascent is None:
            return
        (micro_batch,) = self.trainer._run.batch
        loss = model(**micro_batch.inputs).loss
        at_x = parameters_to_vector(torch.autograd.grad(loss, engine.params)).double()
        g = parameters_to_vector(engine.ascent_grads.views).double()
        cosine = torch.nn.functional.cosine_similarity(g, at_x, dim=0).item()
        self.found.append((cosine, (g - at_x).norm().item()))


def test_the_error_of_the_lookahead_is_that_of_its_gradient(tmp_path):
    direct = Direct()
    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, learning_rate=3e-2, diagnostics_steps=1, lmbda=0.0),
        train_dataset=tiny.sentences(16),
        callbacks=[direct],
    )
    direct.trainer = trainer
    trainer.train()
    lines = [line for line in trainer.state.log_history if "lookahead_cosine" in line]
    found = [(line["lookahead_cosine"], line["lookahead_distance"]) for line in lines]
    assert len(found) == 7 and min(cosine for cosine, _ in found) < 0.9999
    for pair, expected in zip(found, direct.found, strict=True):
        assert pair == pytest.approx(expected, rel=1e-4)


def test_sharpness_and_eigenvalue_are_those_of_the_model_in_evaluation_mode(tmp_path):
    held_out = tiny.sentences(8, seed=2)
    trainer = SAMPaTrainer(
        model=tiny.bert(0.1),
        args=tiny.arguments(tmp_path, max_steps=2, per_device_eval_batch_size=4),
        train_dataset=tiny.sentences(16),
        eval_dataset=held_out,
    )
    callback = DiagnosticsCallback(trainer, batches=2, iterations=200, tolerance=1e-7, radius=0.1)
    trainer.add_callback(callback)
    trainer.train()
    model = trainer.model.eval()
    inputs = {name: torch.stack([torch.as_tensor(item[name]) for item in held_out]) for name in held_out[0]}
    params, x = list(model.parameters()), [param.detach().clone() for param in model.parameters()]

    def gradient_at(displacement):
        for param, own, moved in zip(params, x, displacement, strict=True):
            param.data = own + moved
        loss = model(**inputs).loss
        return loss.item(), torch.autograd.grad(loss, params)

    loss, g = gradient_at([0.0] * len(x))
    norm = parameters_to_vector(g).norm()
    perturbed, _ = gradient_at([0.1 * each / norm for each in g])
    last = trainer.state.log_history[-1]
    assert last["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["held_out_sharpness"] == pytest.approx(perturbed - loss, rel=1e-3)
    # Power iteration by differences of gradients, shifted because there is a negative eigenvalue as large.
    vector = [torch.randn_like(each) for each in x]
    for _ in range(150):
        scale = 1e-2 / parameters_to_vector(vector).norm()
        step = [scale * each for each in vector]
        up, down = gradient_at(step)[1], gradient_at([-each for each in step])[1]
        moved = [(a - b) / 2e-2 for a, b in zip(up, down, strict=True)]
        quotient = sum((a * b).sum() for a, b in zip(moved, step, strict=True)).item() / 1e-2
        vector = [a + 2 * b / 1e-2 for a, b in zip(moved, step, strict=True)]
    assert last["hessian_eigenvalue"] == pytest.approx(quotient, rel=2e-2)


@pytest.mark.parametrize("name", ["every", "batches", "iterations", "tolerance", "radius"])
def test_what_cannot_be_measured_is_refused(tmp_path, name):
    trainer = SAMPaTrainer(model=tiny.bert(), args=tiny.arguments(tmp_path), train_dataset=tiny.sentences(4))
    whole = name in ("every", "batches", "iterations")
    least = 0 if name == "iterations" else 1
    expected = f"a whole number of at least {least}" if whole else "a finite number of at least 0"
    for value in (least - 1, 1.5, "2", True) if whole else (-0.1, "2", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name}: expected {expected}, got {value!r}"):
            DiagnosticsCallback(trainer, **{name: value})
    for value in (-1, 1.5, "2", True):
        with pytest.raises(
            ValueError, match="diagnostics_steps: expected a whole number of steps, or 0 for never, got"
        ):
            tiny.arguments(tmp_path, diagnostics_steps=value)
        with pytest.raises(ValueError, match="diagnostics_iterations: expected a whole number of products, or 0 for"):
            tiny.arguments(tmp_path, diagnostics_iterations=value)
    for value in (-0.1, "2", True, float("nan"), float("inf"), 1e39):
        with pytest.raises(
            ValueError, match="diagnostics_radius: expected a number from 0 to .* or None for rho, got"
        ):
            tiny.arguments(tmp_path, diagnostics_radius=value)
    with pytest.raises(ValueError, match="trainer: expected a SAMPaTrainer or BaselineTrainer, got int"):
        DiagnosticsCallback(3)


UNLABELLED = [{name: value for name, value in item.items() if name != "labels"} for item in tiny.sentences(8)]


@pytest.mark.parametrize(
    ("method", "eval_dataset", "own", "said"),
    [
        ("sampa", None, False, "only the look-ahead is measured, since the trainer has no eval_dataset"),
        ("sam", None, False, "nothing is measured, since the trainer has no eval_dataset"),
        (
            "sampa",
            {"a": tiny.sentences(8), "b": tiny.sentences(4)},
            False,
            "of the evaluation datasets the first, 'a',",
        ),
        ("sampa", tiny.sentences(8), True, "two callbacks measure. Leave out diagnostics_steps, or the callback"),
        (
            "sampa",
            UNLABELLED,
            False,
            "nothing is measured on evaluation data without labels: The model did not return",
        ),
    ],
)
def test_what_is_not_measured_as_one_may_expect_is_said_once(tmp_path, caplog, method, eval_dataset, own, said):
    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, max_steps=3, diagnostics_steps=1, method=method),
        train_dataset=tiny.sentences(16),
        eval_dataset=eval_dataset,
    )
    if own:
        trainer.add_callback(DiagnosticsCallback(trainer, every=2))
    with tiny.transformers_log(caplog):
        trainer.train()
    # By identity: pytest may see one record twice.
    found = {id(record): record.getMessage() for record in caplog.records if "Diagnostics: " in record.getMessage()}
    assert len(found) == 1 and said in next(iter(found.values()))
    held_out = [line for line in trainer.state.log_history if "held_out_loss" in line]
    assert len(held_out) == (0 if not eval_dataset or eval_dataset is UNLABELLED else 4 + 3 * own)
    assert trainer.state.global_step == 3


def test_the_callback_of_another_trainer_is_refused(tmp_path):
    one, other = (
        SAMPaTrainer(model=tiny.bert(), args=tiny.arguments(tmp_path), train_dataset=tiny.sentences(8))
        for _ in range(2)
    )
    one.add_callback(DiagnosticsCallback(other))
    with pytest.raises(ValueError, match="trainer: expected the one that the callback was added to, got another"):
        one.train()


class WithLossOfItsOwn(torch.nn.Module):
    """Reads no labels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        loss = ((x * self.weight - 1) ** 2).mean()
        return {"loss": loss, "out": x}


def test_a_model_that_needs_no_labels_is_measured(tmp_path):
    samples = [{"x": torch.full((3,), float(i))} for i in range(8)]
    trainer = SAMPaTrainer(
        model=WithLossOfItsOwn(),
        args=tiny.arguments(tmp_path, max_steps=2, diagnostics_steps=1),
        train_dataset=samples,
        eval_dataset=samples,
    )
    trainer.train()
    assert len([line for line in trainer.state.log_history if "hessian_eigenvalue" in line]) == 3


def test_evaluation_data_that_come_later_are_measured_on(tmp_path):
    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, max_steps=1, diagnostics_steps=1),
        train_dataset=tiny.sentences(8),
    )
    trainer.train()
    trainer.eval_dataset = tiny.sentences(4)
    trainer.train()
    assert any("held_out_loss" in line for line in trainer.state.log_history)
