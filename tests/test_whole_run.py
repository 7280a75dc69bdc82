"""A whole run of a script: what its folder holds, whose run goes on in it, when it stops, what is said of it and of errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from unittest import mock

import pytest
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from hf_sampa.cards import started
from hf_sampa.finetuning import BaselineTrainer, FineTuningArguments, learning_curve, output_folder, train_and_score
from tests import tiny
from tests.ranks import run_script


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(
    folder, *callbacks, dataset="GLUE rte", model_name="bert-tiny", compute_metrics=accuracy, test=None, **settings
):
    """A run of four steps in two epochs; returns its trainer. `test` is what it predicts."""
    given = {"method": "sampa", "num_train_epochs": 2, "batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    given |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_total_limit": None, **settings}
    args = FineTuningArguments(output_dir=str(folder), **given)
    kind = BaselineTrainer if args.method == "adamw" else SAMPaTrainer
    model = tiny.bert()
    model.config._name_or_path = f"models/{model_name}"
    trainer = kind(
        model,
        args,
        train_dataset=tiny.sentences(8) if args.do_train else None,
        eval_dataset=tiny.sentences(6, seed=2) if args.do_eval else None,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )
    train_and_score(
        trainer,
        scores=["accuracy"],
        test_dataset=test,
        write_predictions=predict,
        dataset=dataset,
        dataset_split="validation",
    )
    return trainer


def predict(output, folder, name=""):
    (folder / (f"{name}.tsv" if name else "predictions.csv")).write_text(str(len(output.predictions)))


def unlabelled(count):
    return [{name: each for name, each in row.items() if name != "labels"} for row in tiny.sentences(count)]


def read(folder, name):
    return json.loads((folder / name).read_text())


class Killed(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# The folder


@pytest.mark.parametrize("method", FineTuningArguments.METHODS)
def test_what_a_run_leaves(method, tmp_path):
    run(tmp_path, method=method)
    assert {each.name for each in tmp_path.iterdir()} >= {
        "checkpoint-4",
        "model.safetensors",
        "README.md",
        "learning_curve.png",
    }
    results = read(tmp_path, "all_results.json")
    assert (results["train_samples"], results["eval_samples"]) == (8, 6) and results["eval_accuracy"] <= 1


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_an_overwritten_run_is_not_continued_by_the_one_that_overwrites_it(method, tmp_path, caplog):
    old = run(tmp_path, method=method, num_train_epochs=3, do_predict=True, test=unlabelled(3))
    (tmp_path / "notes.txt").write_text("mine")
    # As a process leaves it that was killed while it replaced a checkpoint.
    os.rename(tmp_path / "checkpoint-2", tmp_path / "_checkpoint-2.replaced")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(1), method=method, overwrite_output_dir=True, seed=7)
    aside = tmp_path / "_replaced-1"
    assert f"--overwrite_output_dir: 14 files and folders of the run before are in {aside} now." in caplog.text
    assert {each.name for each in aside.iterdir()} == {
        *("_checkpoint-2.replaced", "checkpoint-4", "checkpoint-6", "trainer_state.json", "all_results.json"),
        *("train_results.json", "eval_results.json", "test_results.json", "learning_curve.png", "_run.json"),
        *("model.safetensors", "config.json", "training_args.bin", "README.md", "predictions.csv"),
    }
    assert {each.name for each in tmp_path.iterdir()} == {"notes.txt", "_run.json", "_replaced-1"}
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(ValueError) as caught:
        run(tmp_path, method=method, seed=7, resume_from_checkpoint="true")
    assert str(caught.value) == (
        f"--resume_from_checkpoint true: expected a checkpoint in {tmp_path}, got none: no run in it came as far. Start it anew, "
        "with --overwrite_output_dir in the place of this option."
    )
    # Killed later, it goes on from its own.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(3), method=method, overwrite_output_dir=True, seed=7)
    resumed = run(tmp_path, method=method, seed=7, resume_from_checkpoint="true")
    expected = run(tmp_path / "other", method=method, seed=7)
    assert tiny.differing(expected.model.state_dict(), resumed.model.state_dict()) == []
    assert tiny.differing(old.model.state_dict(), resumed.model.state_dict()) != []
    assert "checkpoint-6" not in os.listdir(tmp_path) and (aside / "checkpoint-6" / "model.safetensors").is_file()


def test_results_of_an_overwritten_run_are_not_among_the_new_ones(tmp_path):
    run(tmp_path)
    run(tmp_path, overwrite_output_dir=True, compute_metrics=None)
    assert "eval_accuracy" not in read(tmp_path, "all_results.json")
    assert "eval_accuracy" in read(tmp_path / "_replaced-1", "all_results.json")


def test_a_card_that_a_person_wrote_stays(tmp_path):
    run(tmp_path, max_steps=1, do_eval=False)
    (tmp_path / "README.md").write_text("# My model\n")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(0), overwrite_output_dir=True)
    assert (tmp_path / "README.md").read_text() == "# My model\n" and not (tmp_path / "model.safetensors").exists()


def test_the_weights_of_a_run_that_was_killed_while_it_saved_them_are_moved_aside(tmp_path, monkeypatch):
    class Died(BaselineTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            if not _internal_call:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[__name__], "BaselineTrainer", Died)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, method="adamw")
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(0), method="adamw", overwrite_output_dir=True)
    assert {each.name for each in tmp_path.iterdir()} == {"_run.json", "_replaced-1"}


@pytest.mark.parametrize("method", ["adamw", "sam"])
def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path, method, caplog):
    """By AdamW, too, of which upstream takes the last one as it is."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(3), method=method, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "config.json").write_text("{}")
    trainer = run(tmp_path, method=method, save_strategy="steps", save_steps=1, resume_from_checkpoint=True)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4]
    assert "Passing over a checkpoint" in caplog.text and "checkpoint-9" in caplog.text


RUN = {"method": "sampa", "data set": "GLUE rte", "model": "bert-tiny"}


@pytest.mark.parametrize("place", range(1, 9))
def test_a_kill_while_a_run_is_moved_aside_leaves_the_old_run_or_none(place, tmp_path, monkeypatch):
    """A copy of the note, the new one, five names that are moved, the last note: before each of them."""
    output_folder.begin(tmp_path, RUN)
    with output_folder.noted(tmp_path):
        (tmp_path / "model.safetensors").write_text("old")
    for name in ("checkpoint-2", "checkpoint-4", "_checkpoint-6.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "trainer_state.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    old = {each.name for each in tmp_path.iterdir()} - {"notes.txt"}
    calls = []

    def dying(change, *given, **named):
        calls.append(given)
        if len(calls) == place:
            raise KeyboardInterrupt
        return change(*given, **named)

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "copyfile")):
            patch.setattr(module, name, partial(dying, getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            output_folder.begin_anew(tmp_path, RUN, None)
    output_folder.open_again(tmp_path)
    there = {each.name for each in tmp_path.iterdir()} - {"_replaced-1"}
    if place <= 2:
        assert there == {*old, "notes.txt"}
    else:
        assert there == {"notes.txt", "_run.json"}
        assert {each.name for each in (tmp_path / "_replaced-1").iterdir()} == old
        assert "moving" not in read(tmp_path, "_run.json")
        with pytest.raises(ValueError, match="got none: no run in it came as far"):
            output_folder.check_has_checkpoint(tmp_path)


def test_a_move_is_finished_by_the_run_that_opens_the_folder(tmp_path, monkeypatch):
    run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, overwrite_output_dir=True, seed=7)
    assert (tmp_path / "checkpoint-4").is_dir()
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint true: expected a checkpoint in .*, got none"):
        run(tmp_path, resume_from_checkpoint="true")
    assert (tmp_path / "_replaced-1" / "checkpoint-4").is_dir()


def test_a_note_moves_nothing_outside_of_its_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    (folder / "_run.json").write_text('{"moving": {"names": ["../mine"], "to": "../elsewhere"}}')
    output_folder.open_again(folder)
    assert (tmp_path / "mine").is_file() and {each.name for each in tmp_path.iterdir()} == {"mine", "run"}


# Results and predictions


PREDICTS = {"do_train": False, "do_eval": False, "do_predict": True}


def test_results_of_two_test_sets_are_not_mixed(tmp_path, caplog):
    run(tmp_path, test=tiny.sentences(5), do_predict=True)
    before = read(tmp_path, "all_results.json")
    assert before["test_samples"] == 5 and "test_accuracy" in before
    run(tmp_path, test=unlabelled(3), **PREDICTS)
    after = read(tmp_path, "all_results.json")
    assert after["test_samples"] == 3 and "test_accuracy" not in after
    assert not [name for name in after if "preparation" in name], (
        "how long it took to make the model ready is no result"
    )
    assert {name: each for name, each in after.items() if not name.startswith("test_")} == {
        name: each for name, each in before.items() if not name.startswith("test_")
    }
    aside = tmp_path / "_replaced-1"
    assert (
        f"all_results.json, predictions.csv, test_results.json of before are in {aside} now, since new ones are written. Delete "
        "it if nobody needs them." in caplog.text
    )
    assert read(aside, "all_results.json") == before and (aside / "predictions.csv").read_text() == "5"
    assert (tmp_path / "predictions.csv").read_text() == "3"


def test_results_of_data_sets_with_names_are_not_mixed(tmp_path):
    run(tmp_path, max_steps=1, do_eval=False)
    run(tmp_path, test={"matched": tiny.sentences(5), "mismatched": tiny.sentences(4)}, **PREDICTS)
    assert "test_mismatched_accuracy" in read(tmp_path, "all_results.json")
    run(tmp_path, test={"matched": unlabelled(3)}, **PREDICTS)
    found = read(tmp_path, "all_results.json")
    assert {name for name in found if name.startswith("test_")} >= {"test_matched_samples"}
    assert not [name for name in found if "accuracy" in name or "mismatched" in name]
    # Named in no `prediction_files`, known from the note.
    assert (tmp_path / "_replaced-1" / "mismatched.tsv").read_text() == "4"
    assert not (tmp_path / "mismatched.tsv").exists() and (tmp_path / "matched.tsv").read_text() == "3"


def test_results_of_weights_before_are_not_among_those_of_a_run_that_trains_on(tmp_path):
    run(tmp_path, num_train_epochs=1, lr_scheduler_type="constant")
    run(
        tmp_path,
        do_eval=False,
        resume_from_checkpoint="true",
        lr_scheduler_type="constant",
    )
    assert not [name for name in read(tmp_path, "all_results.json") if name.startswith("eval_")]
    assert {each.name for each in (tmp_path / "_replaced-1").iterdir()} == {
        *("all_results.json", "train_results.json", "eval_results.json")
    }


def test_predictions_that_a_person_wrote_are_not_lost(tmp_path):
    (tmp_path / "predictions.csv").write_text("by hand")
    (tmp_path / "all_results.json").write_text("cut sho")
    run(tmp_path, test=unlabelled(3), **PREDICTS)
    assert (tmp_path / "predictions.csv").read_text() == "3"
    assert (tmp_path / "_replaced-1" / "predictions.csv").read_text() == "by hand"
    assert (tmp_path / "_replaced-1" / "all_results.json").read_text() == "cut sho"
    assert read(tmp_path, "all_results.json")["test_samples"] == 3


# Whose run goes on


def test_the_checkpoint_that_an_overwriting_run_goes_on_from_stays(tmp_path):
    run(tmp_path)
    named = run(tmp_path, overwrite_output_dir=True, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert named.state.global_step == 4
    assert [each.name for each in (tmp_path / "_replaced-1").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("settings", "now", "then"),
    [
        ({"method": "sam"}, "method sam", "method sampa"),
        ({"method": "adamw"}, "method adamw", "method sampa"),
        ({"model_name": "bert-mini"}, "model bert-mini", "model bert-tiny"),
        ({"dataset": "GLUE mrpc"}, "data set GLUE mrpc", "data set GLUE rte"),
    ],
)
def test_true_continues_no_other_run(settings, now, then, tmp_path):
    run(tmp_path, num_train_epochs=1)
    with pytest.raises(ValueError) as caught:
        run(tmp_path, resume_from_checkpoint="true", **settings)
    assert str(caught.value) == (
        f"--resume_from_checkpoint true: expected in {tmp_path} a run with {now}, got one with {then}. Choose the --output_dir of "
        "this run, or start anew with --overwrite_output_dir in the place of this option."
    )
    # Nor does a checkpoint that is named.
    named = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "own", resume_from_checkpoint=str(named), **settings)
    assert str(caught.value) == (
        f"--resume_from_checkpoint {named}: expected in {tmp_path} a run with {now}, got one with {then}. Name a checkpoint of this "
        f"run, or begin a new one with its weights: --model_name_or_path {named} in the place of this option, and an "
        "--output_dir of its own."
    )


def test_a_checkpoint_that_is_named_does_not_go_on_among_those_of_another_run(tmp_path):
    run(tmp_path / "rte", num_train_epochs=1)
    run(tmp_path / "mrpc", num_train_epochs=1, dataset="GLUE mrpc")
    named = str(tmp_path / "rte" / "checkpoint-2")
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "mrpc", resume_from_checkpoint=named)
    assert str(caught.value) == (
        f"--resume_from_checkpoint {named}: expected in {tmp_path / 'mrpc'} a run with data set GLUE rte, got one with data set "
        "GLUE mrpc. Choose another --output_dir, or add --overwrite_output_dir."
    )
    assert run(tmp_path / "mrpc", resume_from_checkpoint=named, overwrite_output_dir=True).state.global_step == 4


# When it stops


class Drops:
    """An accuracy that falls from the second evaluation on."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, prediction):
        return {"accuracy": self.values.pop(0)}


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_a_run_stops_early_and_a_resumed_one_at_the_same_step(method, tmp_path, caplog):
    early = {
        "early_stopping_patience": 3,
        "metric_for_best_model": "accuracy",
        "method": method,
        "num_train_epochs": 9,
    }
    scores = [0.5, 0.8, 0.7, 0.6, 0.5, 0.4]
    whole = run(tmp_path / "whole", compute_metrics=Drops([*scores[:5], 0.8]), **early)
    assert whole.state.global_step == 10 and whole.state.best_global_step == 4
    said = "Stopped at step 10: eval_accuracy was not better for 3 evaluations than 0.8 at step 4."
    assert caplog.text.count(said) == 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", Killed(8), compute_metrics=Drops(scores), **early)
    again = run(tmp_path / "two", compute_metrics=Drops([0.5, 0.8]), resume_from_checkpoint="true", **early)
    assert again.state.global_step == 10 and caplog.text.count(said) == 2
    assert tiny.differing(whole.model.state_dict(), again.model.state_dict()) == []
    assert "weights: those of step 4, the best by accuracy" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_a_run_that_was_stopped_early_trains_no_further_step(method, tmp_path, caplog):
    early = {"early_stopping_patience": 2, "metric_for_best_model": "accuracy", "method": method}
    early |= {"num_train_epochs": 6, "max_steps": 12}
    stopped = run(tmp_path, compute_metrics=Drops([0.5, 0.8, 0.7, 0.6, 0.8]), **early)
    assert stopped.state.global_step == 8
    caplog.clear()
    again = run(tmp_path, compute_metrics=Drops([0.8]), resume_from_checkpoint="true", **early)
    assert again.state.global_step == 8
    assert tiny.differing(stopped.model.state_dict(), again.model.state_dict()) == []
    assert (
        "No further step is trained, since the run was stopped at step 8: eval_accuracy was not better for 2 evaluations than 0.8 at "
        "step 4. A larger --early_stopping_patience goes on." in caplog.text
    )
    assert "epochs: 4\n" in (tmp_path / "README.md").read_text()
    # It does, by its own settings, where upstream would take those of the checkpoint.
    early["early_stopping_patience"] = 3
    more = run(tmp_path, compute_metrics=Drops([0.7, 0.8]), resume_from_checkpoint="true", **early)
    assert more.state.global_step == 10


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_a_finished_run_trains_no_further_step(method, tmp_path):
    """Where its last step is within an epoch."""
    finished = run(tmp_path, method=method, max_steps=3)
    again = run(tmp_path, method=method, max_steps=3, resume_from_checkpoint="true")
    assert again.state.global_step == 3
    assert tiny.differing(finished.model.state_dict(), again.model.state_dict()) == []


# The picture


HISTORY = [
    {"step": 1, "loss": 0.9, "sharpness": 0.1},
    {
        "step": 2,
        "eval_loss": 0.8,
        "eval_accuracy": 0.5,
        "eval_runtime": 1.0,
        "eval_matched_loss": 0.7,
        "eval_matched_f1": 0.2,
    },
    {"step": 3, "loss": 0.7},
    {"step": 3, "train_runtime": 3.0, "train_loss": 0.8},
]


def test_the_curve_has_losses_and_metrics_by_step():
    losses, metrics = learning_curve.curves(HISTORY)
    assert losses == {"training": [(1, 0.9), (3, 0.7)], "evaluation": [(2, 0.8)], "evaluation matched": [(2, 0.7)]}
    assert metrics == {"accuracy": [(2, 0.5)], "matched f1": [(2, 0.2)]}


@pytest.mark.parametrize("first", [0, 1, 3])
def test_every_curve_has_a_colour_of_its_own_whatever_was_logged_first(first, tmp_path, monkeypatch):
    drawn = {}

    def note(figure, file):
        drawn.update({line.get_label(): line.get_color() for panel in figure.axes for line in panel.get_lines()})

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", note)
    learning_curve.draw([HISTORY[1], *HISTORY[:1], *HISTORY[2:]][:first] if first else HISTORY, tmp_path)
    colours = {"training": "C0", "evaluation": "C1", "evaluation matched": "C2", "accuracy": "C1", "matched f1": "C2"}
    assert drawn == {name: each for name, each in colours.items() if first != 1 or name != "training"}


def test_without_matplotlib_there_is_a_sentence_instead(tmp_path, monkeypatch, caplog):
    FineTuningArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    learning_curve.draw(HISTORY, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "There is no learning_curve.png, since matplotlib is not installed: pip install matplotlib." in caplog.text


# The card


def test_the_card_of_the_baseline_is_true(tmp_path):
    run(tmp_path, method="adamw", label_smoothing_factor=0.1)
    text = (tmp_path / "README.md").read_text()
    assert (
        "This model was trained on GLUE rte. It was trained with the plain Trainer of transformers, as a baseline"
        in text
    )
    assert "by [hf_sampa](https://github.com/hf-sampa/hf_sampa)." in text
    assert (
        "- label_smoothing_factor: 0.1\n" in text and "- method: adamw\n" in text and "loshchilov2019decoupled" in text
    )
    assert "| GLUE rte | validation | 6 | 4 | accuracy |" in text
    assert not {"rho", "lmbda", "variant", "timing"} & {line[2:].partition(":")[0] for line in text.splitlines()}
    assert "sharpness" not in text.partition("## Results")[2]


def test_a_setting_that_a_scripts_class_has_otherwise_is_on_the_card(tmp_path):
    from vit_arguments import ViTTrainingArguments

    args = ViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, batch_size=4)
    trainer = SAMPaTrainer(tiny.bert(), args, train_dataset=tiny.sentences(8), eval_dataset=tiny.sentences(4))
    trainer.train()
    trainer.create_model_card()
    assert "- label_smoothing_factor: 0.1\n" in (tmp_path / "README.md").read_text()


def test_the_command_on_a_card_starts_the_run_anew(tmp_path, monkeypatch):
    """In a folder of its own, from where the first was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = [
        "--output_dir",
        f"{tmp_path}/out/",
        "--overwrite_output_dir",
        "--data_dir",
        str(tmp_path / "data"),
        "--resume_from_checkpoint=true",
    ]
    monkeypatch.setattr(started, "_given", [])
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), *words, "--seed", "1"])
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    sys.modules["__main__"].__spec__ = None
    command = started.command(FineTuningArguments, 1)
    assert command == "```bash\npython run.py --output_dir out-again --data_dir data --seed 1\n```"
    continued = started.command(FineTuningArguments, 1, resumed=True)
    assert "--output_dir out --data_dir data --resume_from_checkpoint=true" in continued


def test_a_script_that_was_started_from_elsewhere_is_named_without_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(started, "_given", [])
    monkeypatch.setattr(sys, "argv", ["/home/somebody/glue/run_classification.py", "--seed", "1"])
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    sys.modules["__main__"].__spec__ = None
    assert started.command(FineTuningArguments, 1) == (
        "Put the folder of `run_classification.py` before its name:\n\n```bash\npython run_classification.py --seed 1\n```"
    )


# Errors


SCRIPT = """
import atexit
import sys
import time
from accelerate import PartialState
from hf_sampa.finetuning import run_main

def main():
    kind = sys.argv[1]
    PartialState(cpu=True)
    if kind == "late" and PartialState().process_index == 0:
        time.sleep(1)
    if kind in ("late", "slow to end"):
        if kind == "slow to end" and PartialState().process_index == 0:
            atexit.register(time.sleep, 1)
        raise ValueError("rows.csv, line 3: expected a label, got none.")
    if kind == "told":
        raise ValueError("rows.csv, line 3: expected a label, got none.")
    if kind == "missing":
        open("no/such/file")
    if kind == "bug":
        int("x")
    if kind == "one" and PartialState().process_index == 1:
        raise ValueError("of this process alone")
    print("done")

if __name__ == "__main__":
    run_main(main)
"""


def shortened():
    from hf_sampa.finetuning import script

    script.SECONDS = 0.2


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("told", 1, "script.py: error: rows.csv, line 3: expected a label, got none.\n"),
        ("missing", 1, "script.py: error: [Errno 2] No such file or directory: 'no/such/file'\n"),
        ("none", 0, ""),
    ],
)
def test_an_error_of_the_users_is_one_message(kind, code, said, tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (ran,) = run_script(tmp_path / "script.py", kind, folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (code, said)


@pytest.mark.distributed
def test_a_mistake_of_ours_has_its_traceback(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (ran,) = run_script(tmp_path / "script.py", "bug", folder=tmp_path)
    assert ran.returncode == 1 and "Traceback" in ran.stderr and "invalid literal for int()" in ran.stderr


@pytest.mark.distributed
def test_what_one_process_alone_finds_is_not_lost(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    main, other = run_script(tmp_path / "script.py", "one", folder=tmp_path, processes=2, prepare=shortened)
    assert (main.returncode, other.returncode) == (0, 1)
    assert other.stderr == "script.py: error: of this process alone\n"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["late", "slow to end"])
def test_what_two_processes_find_is_one_message_however_slow_the_main_one_is(kind, tmp_path):
    """No launcher ends the other one here."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    ran = run_script(tmp_path / "script.py", kind, folder=tmp_path, processes=2, prepare=shortened)
    assert [each.returncode for each in ran] == [1, 1]
    said = "script.py: error: rows.csv, line 3: expected a label, got none.\n"
    assert [each.stderr for each in ran] == (["", said] if kind == "late" else [said, ""])


@pytest.mark.distributed
@pytest.mark.whole
def test_two_processes_say_it_once(tmp_path):
    """The launcher ends the other one, and adds its own report."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run([*command, str(tmp_path / "script.py"), "told"], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("expected a label") == 1
