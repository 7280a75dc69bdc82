"""What a person sees of a run: the progress bar, and what reaches the trackers."""

from __future__ import annotations

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ProgressCallback, Trainer, TrainingArguments

from hf_sampa import SAMPaTrainer
from tests import tiny


def trainer_of(folder, callbacks=None, **changes):
    return SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(folder, max_steps=4, **changes),
        train_dataset=tiny.sentences(16),
        eval_dataset=tiny.sentences(8, seed=2),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_the_progress_bar_shows_both_losses_and_the_sharpness_of_the_last_step(tmp_path, capsys, monkeypatch, method):
    # tqdm cuts what a narrow terminal has no room for.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "24")
    trainer = trainer_of(tmp_path, disable_tqdm=False, method=method)
    trainer.train()
    last = trainer.state.log_history[-2]  # the last line is the summary
    shown = re.findall(r"loss=(\S+), perturbed=(\S+), sharpness=([^\s\]]+)", capsys.readouterr().err)[-1]
    for text, name in zip(shown, ("loss", "perturbed_loss", "sharpness"), strict=True):
        assert float(text) == pytest.approx(last[name], rel=1e-3)


def test_the_progress_bar_leaves_out_what_a_step_does_not_have(tmp_path, capsys):
    trainer_of(tmp_path, disable_tqdm=False, method="sam", variant="sam_db").train()
    error = capsys.readouterr().err
    assert "perturbed=" in error and "sharpness=" not in error


def test_the_callbacks_are_plain_trainers(tmp_path, capsys):
    """Whoever looks for one by its class, or passed a bar of his own, finds it."""

    class Mine(ProgressCallback):
        pass

    own = Mine()
    settings = {"disable_tqdm": False, "output_dir": str(tmp_path)}
    trainers = [
        trainer_of(tmp_path, disable_tqdm=False, callbacks=[own]),
        Trainer(tiny.bert(), TrainingArguments(use_cpu=True, report_to="none", **settings), callbacks=[own]),
    ]
    ours, plain = ([type(each) for each in trainer.callback_handler.callbacks] for trainer in trainers)
    assert ours == plain
    assert any(callback is own for callback in trainers[0].callback_handler.callbacks)
    trainers[0].remove_callback(ProgressCallback)
    trainers[0].train()
    assert "perturbed=" in capsys.readouterr().err  # on the bar that is left


def test_everything_reaches_tensorboard_under_clear_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(tmp_path, report_to="tensorboard", diagnostics_steps=2, eval_strategy="epoch")
    trainer.train()
    (file,) = (tmp_path / "events").rglob("events.*")  # the last measurement, too, is of this run
    events = EventAccumulator(str(file.parent)).Reload()
    expected = {
        "loss",
        "perturbed_loss",
        "sharpness",
        "grad_norm",
        "ascent_grad_norm",
        "ascent_cosine",
        "learning_rate",
    }
    expected |= {"lookahead_cosine", "lookahead_distance", "held_out_loss", "held_out_sharpness", "hessian_eigenvalue"}
    assert {f"train/{name}" for name in expected} | {"eval/loss"} <= set(events.Tags()["scalars"])
    for name in ("sharpness", "hessian_eigenvalue"):
        logged = [(line["step"], line[name]) for line in trainer.state.log_history if name in line]
        assert {e.step: e.value for e in events.Scalars(f"train/{name}")} == pytest.approx(dict(logged), rel=1e-6)


def test_a_notebook_shows_them_too(tmp_path, monkeypatch):
    from transformers.utils import notebook

    shown = []
    monkeypatch.setattr(notebook.disp, "HTML", shown.append)
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    trainer = trainer_of(tmp_path, disable_tqdm=False, eval_strategy="epoch")
    trainer.train()
    last = trainer.state.log_history[-3]
    bar = re.findall(r"loss (\S+), perturbed (\S+), sharpness (\S+)", shown[-1])
    assert [float(text) for text in bar[0]] == pytest.approx(
        [last[name] for name in ("loss", "perturbed_loss", "sharpness")], rel=1e-3
    )
    assert "Validation Loss" in shown[-1]
