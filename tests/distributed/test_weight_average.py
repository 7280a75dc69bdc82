"""The moving average of the weights: what it is, what it is used for, that it changes nothing of the training, and who cannot have it."""

from __future__ import annotations

import re
from functools import partial
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_sampa import SAMPaTrainer
from hf_sampa.finetuning import BaselineTrainer, FineTuningArguments, output_folder
from hf_sampa.finetuning.weight_average import WeightAverageCallback
from tests import sharded, test_whole_run, tiny
from tests.ranks import run_ranks
from tests.test_whole_run import Killed, read, run


pytestmark = pytest.mark.distributed

DECAY = 0.6
METHODS = FineTuningArguments.METHODS
AVERAGE = "weight_average.safetensors"


class Steps(TrainerCallback):
    """What is trained, after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: each.detach().clone() for name, each in model.named_parameters()})


def averages(steps):
    """After every step, by hand."""
    found = steps[:1]
    for weights in steps[1:]:
        found.append({name: torch.lerp(each, weights[name], 1 - DECAY) for name, each in found[-1].items()})
    return found


def weights_in(folder):
    return dict(AutoModelForSequenceClassification.from_pretrained(folder).named_parameters())


def evaluations(trainer):
    return [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_and_the_result_are_of_the_average_and_the_training_is_the_same(tmp_path, method):
    settings = {"method": method, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    steps, without = Steps(), Steps()
    trainer = run(tmp_path / "averaged", steps, ema_decay=DECAY, diagnostics_steps=2, **settings)
    plain = run(tmp_path / "plain", without, **settings)
    assert len(steps.weights) == 4 and tiny.differing(steps.weights, without.weights) == []
    expected = averages(steps.weights)
    assert tiny.differing(weights_in(tmp_path / "averaged"), expected[-1]) == []
    found = evaluations(trainer)
    assert found[0] == evaluations(plain)[0] and not set(found[1:]) & set(evaluations(plain)[1:])
    for loss, weights in zip(found, [*expected, expected[-1]], strict=True):
        trainer.model.load_state_dict(weights, strict=False)
        assert trainer.evaluate()["eval_loss"] == loss
    assert read(tmp_path / "averaged", "all_results.json")["eval_loss"] == found[-1]
    measured = [line["held_out_loss"] for line in trainer.state.log_history if "held_out_loss" in line]
    assert measured[-1] == pytest.approx(found[-1], rel=1e-6) != pytest.approx(evaluations(plain)[-1], rel=1e-6)
    # An ordinary checkpoint, of what is trained, with one file more.
    saved, ordinary = (tmp_path / name / "checkpoint-3" for name in ("averaged", "plain"))
    assert {each.name for each in saved.iterdir()} - {each.name for each in ordinary.iterdir()} == {AVERAGE}
    assert tiny.differing(weights_in(saved), steps.weights[2]) == []
    held = load_file(saved / AVERAGE)
    assert held.pop(".updates") == 3 and tiny.differing(held, expected[2]) == []


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_the_best_weights_are_the_average_of_the_best_step(tmp_path, method):
    steps, scores = Steps(), iter([0.9, 0.5, 0.7, 0.9, 0.9])
    trainer = run(
        tmp_path,
        steps,
        method=method,
        ema_decay=DECAY,
        compute_metrics=lambda prediction: {"accuracy": next(scores)},
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        num_train_epochs=3,
        test=tiny.sentences(6, seed=2),
        do_predict=True,
    )
    expected = averages(steps.weights)
    assert trainer.weights_step == 2
    assert tiny.differing(dict(trainer.model.named_parameters()), expected[1]) == []
    assert tiny.differing(weights_in(tmp_path), expected[1]) == []
    of_steps = evaluations(trainer)
    assert of_steps[-1] == of_steps[0] == read(tmp_path, "all_results.json")["test_loss"]
    in_checkpoint = tmp_path / "checkpoint-6" / "README.md"
    for card in [tmp_path / "README.md", *([in_checkpoint] if method == "sampa" else [])]:
        assert (
            "- the weights are an exponential moving average of those after every update, with decay 0.6;"
            in card.read_text()
        )
        assert "\n- ema_decay: 0.6\n" in card.read_text()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, method):
    settings = {"method": method, "ema_decay": DECAY, "num_train_epochs": 3}
    whole = run(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Killed(5), **settings)
    found = run(tmp_path / "killed", resume_from_checkpoint="true", **settings)
    assert tiny.differing(found.model.state_dict(), whole.model.state_dict()) == []
    assert evaluations(found) == evaluations(whole)


def ends(folder, **settings):
    trainer = run(folder, ema_decay=DECAY, batch_size=4, **settings)
    return {"weights": trainer.model.state_dict(), "evaluations": evaluations(trainer)}


@pytest.mark.parametrize("changes", [{}, {"shard_optimizer": True}], ids=["each its own", "one optimizer"])
def test_a_pair_ends_with_the_average_of_one_process(tmp_path, changes):
    one = ends(tmp_path / "one")
    for found in run_ranks(partial(ends, **changes), 2, tmp_path / "two", folder=tmp_path / "ranks"):
        assert tiny.differing(found["weights"], one["weights"]) == []
        assert found["evaluations"] == pytest.approx(one["evaluations"], rel=1e-5)


def test_data_parallel_processes_end_with_the_same_average(tmp_path):
    for method in ("adamw", "sam"):
        first, second = run_ranks(
            partial(ends, method=method), 2, tmp_path / method, folder=tmp_path / f"{method}-ranks"
        )
        assert tiny.differing(first, second) == []


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_buffers_are_those_of_what_is_trained(tmp_path, method):
    def trained(decay):
        args = FineTuningArguments(
            str(tmp_path / str(decay)),
            method=method,
            batch_size=4,
            max_steps=3,
            use_cpu=True,
            report_to="none",
            eval_strategy="no",
            save_strategy="no",
            ema_decay=decay,
        )
        kind = BaselineTrainer if method == "adamw" else SAMPaTrainer
        trainer = kind(tiny.BatchNormNet(), args, train_dataset=tiny.images(12))
        if decay is None:
            trainer.train()
        else:
            with WeightAverageCallback(trainer, decay).used():
                trainer.train()
        return trainer.model

    plain, averaged = trained(None), trained(DECAY)
    assert tiny.differing(dict(averaged.named_buffers()), dict(plain.named_buffers())) == []
    assert tiny.differing(dict(averaged.named_parameters()), dict(plain.named_parameters())) != []


def test_a_checkpoint_without_its_average_is_no_whole_one(tmp_path):
    run(tmp_path, ema_decay=DECAY)
    last = tmp_path / "checkpoint-4"
    file = last / AVERAGE
    written = load_file(file)
    save_file({**written, ".updates": written[".updates"] + 1}, file)
    with pytest.raises(ValueError, match=f"is not as it was written: {AVERAGE} has another content"):
        run(tmp_path, ema_decay=DECAY, resume_from_checkpoint=str(last))
    file.unlink()
    with pytest.raises(ValueError, match=f"is not as it was written: {AVERAGE} is missing"):
        run(tmp_path, ema_decay=DECAY, resume_from_checkpoint=str(last))


# Refused


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(tmp_path, decay):
    with pytest.raises(
        ValueError, match=re.escape(f"--ema_decay: expected a number above 0 and below 1, got {decay:g}. 0.999")
    ):
        run(tmp_path, ema_decay=decay)


def test_an_optimizer_that_averages_is_refused(tmp_path):
    words = "--ema_decay: expected an optimizer that keeps no average of its own, got --optim schedule_free_adamw. Leave one"
    with pytest.raises(ValueError, match=words):
        run(tmp_path, ema_decay=DECAY, optim="schedule_free_adamw")


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_a_run_goes_on_with_its_own_decay_or_none(tmp_path, method):
    run(tmp_path, method=method, ema_decay=DECAY)
    given = {"method": method, "resume_from_checkpoint": "true"}
    for now in (None, 0.9):
        words = f"a run with ema_decay {now or 'none'}, got one with ema_decay 0.6"
        with pytest.raises(ValueError, match=words):
            run(tmp_path, ema_decay=now, **given)
    run(tmp_path / "none", method=method)
    (tmp_path / "none" / output_folder.RUN).unlink()
    words = f"--ema_decay 0.6: expected the checkpoint of a run with an average, got .*checkpoint-4, which has no {AVERAGE}"
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "none", ema_decay=DECAY, **given)


def test_the_average_of_another_model_is_refused(tmp_path):
    run(tmp_path, method="adamw", ema_decay=DECAY)
    file = tmp_path / "checkpoint-4" / AVERAGE
    held = load_file(file)
    held.pop(".updates")
    save_file(held, file)
    with pytest.raises(ValueError, match=f"expected in .*{AVERAGE} the weights that are trained, got others"):
        run(tmp_path, method="adamw", ema_decay=DECAY, resume_from_checkpoint="true")


def on_shards(folder):
    with patch.object(test_whole_run, "SAMPaTrainer", sharded.OnCPU):
        try:
            run(folder, ema_decay=DECAY, **sharded.FSDP)
        except ValueError as error:
            return str(error), [*folder.glob("*")]


@sharded.needs_versions
def test_a_model_in_shards_is_refused_before_anything_is_written(tmp_path):
    for words, written in run_ranks(on_shards, 2, tmp_path / "out", folder=tmp_path):
        assert words.startswith(
            "--ema_decay: expected weights that every process holds whole, got a model that FSDP shards."
        )
        assert not written


def test_a_run_that_trains_nothing_has_no_average(tmp_path):
    assert run(tmp_path, ema_decay=DECAY, do_train=False).args.ema_decay is None
