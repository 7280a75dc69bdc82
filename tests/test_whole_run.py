"""A whole run of a script: what its folder holds, whose run goes on in it, when it stops, what is said of it and of errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from hf_sampa.cards import started
from hf_sampa.finetuning import BaselineTrainer, FineTuningArguments, learning_curve, train_and_score
from tests import tiny
from tests.ranks import run_script


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(folder, *callbacks, dataset="GLUE rte", model_name="bert-tiny", compute_metrics=accuracy, **settings):
    """A run of four steps in two epochs; returns its trainer."""
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
    train_and_score(trainer, dataset=dataset, dataset_split="validation")
    return trainer


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
    old = run(tmp_path, method=method, num_train_epochs=3)
    (tmp_path / "notes.txt").write_text("mine")
    # As a process leaves it that was killed while it replaced a checkpoint.
    os.rename(tmp_path / "checkpoint-2", tmp_path / "_checkpoint-2.replaced")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(1), method=method, overwrite_output_dir=True, seed=7)
    aside = tmp_path / "_replaced-1"
    assert f"--overwrite_output_dir: 9 checkpoints and results of the run before are in {aside} now." in caplog.text
    assert {each.name for each in aside.iterdir()} == {
        *("_checkpoint-2.replaced", "checkpoint-4", "checkpoint-6", "trainer_state.json", "all_results.json"),
        *("train_results.json", "eval_results.json", "learning_curve.png", "_run.json"),
    }
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(ValueError) as caught:
        run(tmp_path, method=method, overwrite_output_dir=True, seed=7, resume_from_checkpoint="true")
    assert str(caught.value) == (
        f"--resume_from_checkpoint true: expected a checkpoint in {tmp_path}, got none: no run in it came as far. Start it anew, "
        "without this option."
    )
    # Killed later, it goes on from its own.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(3), method=method, overwrite_output_dir=True, seed=7)
    resumed = run(tmp_path, method=method, overwrite_output_dir=True, seed=7, resume_from_checkpoint="true")
    expected = run(tmp_path / "other", method=method, seed=7)
    assert tiny.differing(expected.model.state_dict(), resumed.model.state_dict()) == []
    assert tiny.differing(old.model.state_dict(), resumed.model.state_dict()) != []
    assert "checkpoint-6" not in os.listdir(tmp_path) and (aside / "checkpoint-6" / "model.safetensors").is_file()


def test_results_of_an_overwritten_run_are_not_among_the_new_ones(tmp_path):
    run(tmp_path)
    run(tmp_path, overwrite_output_dir=True, compute_metrics=None)
    assert "eval_accuracy" not in read(tmp_path, "all_results.json")
    assert "eval_accuracy" in read(tmp_path / "_replaced-1", "all_results.json")


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
        "this run, start anew with --overwrite_output_dir, or name the checkpoint that this run is to go on from."
    )
    # A checkpoint that is named is meant.
    named = run(tmp_path / "own", resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **settings)
    assert named.state.global_step == 4


# When it stops


class Drops:
    """An accuracy that falls from the second evaluation on."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, prediction):
        return {"accuracy": self.values.pop(0)}


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_a_run_stops_early_and_a_resumed_one_at_the_same_step(method, tmp_path):
    early = {
        "early_stopping_patience": 3,
        "metric_for_best_model": "accuracy",
        "method": method,
        "num_train_epochs": 9,
    }
    scores = [0.5, 0.8, 0.7, 0.6, 0.5, 0.4]
    whole = run(tmp_path / "whole", compute_metrics=Drops([*scores[:5], 0.8]), **early)
    assert whole.state.global_step == 10 and whole.state.best_global_step == 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", Killed(8), compute_metrics=Drops(scores), **early)
    again = run(tmp_path / "two", compute_metrics=Drops([0.5, 0.8]), resume_from_checkpoint="true", **early)
    assert again.state.global_step == 10
    assert tiny.differing(whole.model.state_dict(), again.model.state_dict()) == []
    assert "weights: those of step 4, the best by accuracy" in (tmp_path / "two" / "README.md").read_text()


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


# Errors


SCRIPT = """
import sys
from accelerate import PartialState
from hf_sampa.finetuning import run_main

def main():
    kind = sys.argv[1]
    PartialState(cpu=True)
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
@pytest.mark.whole
def test_two_processes_say_it_once(tmp_path):
    """The launcher ends the other one, and adds its own report."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run([*command, str(tmp_path / "script.py"), "told"], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("expected a label") == 1
