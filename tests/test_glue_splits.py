"""Which rows the text scripts train on and score, and by which labels: `--train_val_split` and `--label_noise`."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import run_classification
import run_glue
import torch
from datasets import Dataset, DatasetDict
from make_sample import make_tiny_bert
from own_data import with_labels
from own_problem import MULTI, REGRESSION, SINGLE
from safetensors.torch import load_file
from text_noise import with_noise
from text_splits import split_off

from .ranks import run_script
from .test_glue_tasks import FILES, write_tsv


ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "glue" / "sample"
BOTH = ("--train_val_split", "0.25", "--label_noise", "0.4")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder with configuration and tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    make_tiny_bert(folder, hidden_size=16, num_layers=1, dropout=0.1)
    return folder


@pytest.fixture
def planned(tiny_bert, tmp_path, monkeypatch):
    """What a script hands to `train_and_score`, which is not done."""

    def of(script, *arguments):
        seen = {}
        monkeypatch.setattr(script, "train_and_score", lambda trainer, **given: seen.update(given, trainer=trainer))
        command = ["--model_name_or_path", tiny_bert, "--output_dir", tmp_path / "out", "--use_cpu", *arguments]
        script.main([*map(str, command), "--disable_tqdm", "true"])
        return SimpleNamespace(train=seen["trainer"].train_dataset, scored=seen["trainer"].eval_dataset, **seen)

    return of


def sst2(folder=SAMPLE):
    return "--task_name", "sst2", "--data_dir", folder


@pytest.fixture
def without_dev(tmp_path):
    """The sample's training rows."""
    (tmp_path / "data").mkdir()
    shutil.copy(SAMPLE / "train.tsv", tmp_path / "data")
    return tmp_path / "data"


def rows_of(*datasets):
    """How often each text is there with each label."""
    return Counter((tuple(row["input_ids"]), row["label"]) for data in datasets for row in data)


def changed(data, other):
    """Of how many rows the label is another one, where all else is the same."""
    assert data["input_ids"] == other["input_ids"]
    return int((np.array(data["label"]) != np.array(other["label"])).sum())


# Rows that are kept to score on


def split_off_rows(share, **rows_of):
    """`rows_of` classes, so many each."""
    names = sorted(rows_of)
    labels = [place for place, name in enumerate(names) for _ in range(rows_of[name])]
    rows = with_labels(Dataset.from_dict({"text": ["x"] * len(labels)}), labels, SINGLE, names)
    return split_off(DatasetDict(train=rows), share, SimpleNamespace(do_train=True, do_eval=True))


def test_a_class_of_a_single_row_is_named_where_rows_are_split_off():
    with pytest.raises(ValueError) as caught:
        split_off_rows(0.2, good=20, rare=1, bad=20)
    assert str(caught.value) == (
        "--train_val_split 0.2: expected at least two rows of every class, one for each side, got one of 'rare'. Add rows of it or "
        "take it out, or leave --train_val_split out and score other rows."
    )


@pytest.mark.parametrize(("share", "held_out", "other"), [(0.05, 1, "larger"), (0.95, 19, "smaller")])
def test_a_share_of_fewer_rows_than_classes_is_refused(share, held_out, other):
    with pytest.raises(ValueError) as caught:
        split_off_rows(share, good=10, bad=10)
    assert str(caught.value) == (
        f"--train_val_split {share}: expected at least 2 of the 20 rows on both sides, one of every class, got {held_out} to score on. "
        f"Give a {other} share or more rows, or leave --train_val_split out and score other rows."
    )


@pytest.mark.parametrize(("share", "to"), [(0.1, "score"), (0.9, "train")])
def test_a_class_that_is_on_one_side_only_is_named(share, to, caplog):
    assert split_off_rows(share, good=60, rare=2).num_rows.keys() == {"train", "validation"}
    assert caplog.messages == [
        f"--train_val_split {share}: no row of 'rare' is among those to {to} on. Add rows of it, or leave --train_val_split out and score other rows."
    ]


def test_held_out_rows_are_scored_and_no_others_and_not_trained_on(planned, without_dev):
    whole = planned(run_glue, *sst2())
    run = planned(run_glue, *sst2(without_dev), "--train_val_split", "0.25")
    assert (len(run.train), len(run.scored)) == (600, 200)
    assert rows_of(run.train, run.scored) == rows_of(whole.train)
    shares = [Counter(data["label"])[1] / len(data) for data in (whole.train, run.train, run.scored)]
    assert shares == pytest.approx([shares[0]] * 3, abs=0.005)
    assert run.dataset_split == "train, 25% held out" and whole.dataset_split == "validation"
    assert "scored on 25% of the training rows, which were not trained on" in run.remarks
    assert not any("scored on" in remark for remark in whole.remarks)
    other = planned(run_glue, *sst2(without_dev), "--train_val_split", "0.25", "--seed", "1", "--data_seed", "2")
    assert other.scored["input_ids"] == run.scored["input_ids"] and other.train["input_ids"] == run.train["input_ids"]


def test_limits_are_of_what_was_held_out_and_of_the_rest(planned):
    limits = ["--train_val_split", "0.25", "--max_train_samples", "40", "--max_eval_samples", "50"]
    run = planned(run_glue, *sst2(), *limits)
    assert (len(run.train), len(run.scored)) == (40, 50)
    assert "trained on the first 40 of 600 examples of the rest of train only" in run.remarks
    assert "scored on the first 50 of 200 examples of the held-out part of train only" in run.remarks


@pytest.mark.parametrize("task_name", ["mnli", "stsb"])
def test_what_is_held_out_is_one_set_of_every_task(task_name, planned, tmp_path):
    header, rows = FILES[task_name, "train.tsv"]
    write_tsv(tmp_path / "data" / "train.tsv", header, *(fields for fields, _ in rows * 10))
    run = planned(run_glue, "--task_name", task_name, "--data_dir", tmp_path / "data", "--train_val_split", "0.5")
    assert isinstance(run.scored, Dataset) and len(run.scored) == len(run.train) == len(rows) * 5


def test_rows_that_are_not_scored_are_held_out_all_the_same(planned, without_dev):
    given = [*sst2(without_dev), "--train_val_split", "0.25"]
    run = planned(run_glue, *given, "--do_eval", "false")
    assert run.scored is None and rows_of(run.train) == rows_of(planned(run_glue, *given).train)
    assert not any("scored" in remark for remark in run.remarks)


def test_what_is_predicted_stays_the_test_set(planned, without_dev):
    write_tsv(without_dev / "test.tsv", ["index", "sentence"], ["0", "the plot is dull"], ["1", "vivid"])
    given = [*sst2(without_dev), "--do_predict", "--do_eval", "false"]
    plain, held_out = planned(run_glue, *given), planned(run_glue, *given, *BOTH)
    assert len(plain.test_dataset) == 2 and plain.test_dataset.to_dict() == held_out.test_dataset.to_dict()


# Wrong labels


@pytest.mark.parametrize("arguments", [[], ["--max_train_samples", "41"], ["--train_val_split", "0.25"]])
def test_the_share_of_labels_is_wrong_among_the_rows_that_are_trained_on(arguments, planned):
    clean, noisy = (planned(run_glue, *sst2(), *arguments, "--label_noise", share) for share in (0, 0.3))
    assert changed(noisy.train, clean.train) == round(0.3 * len(clean.train))
    assert changed(noisy.scored, clean.scored) == 0
    assert "of the training labels 30% were replaced at random" in noisy.remarks
    assert not any("replaced" in remark for remark in clean.remarks)


def test_labels_are_the_same_wrong_ones_whatever_the_seed_and_the_method(planned):
    first = planned(run_glue, *sst2(), *BOTH)
    for given in (["--seed", "7"], ["--method", "adamw"], ["--method", "sam", "--data_seed", "3"]):
        other = planned(run_glue, *sst2(), *BOTH, *given)
        assert changed(other.train, first.train) == 0


def test_a_wrong_label_is_any_other_class():
    names = ["bad", "good", "neither"]
    rows = with_labels(Dataset.from_dict({"text": [str(n) for n in range(600)]}), [1] * 600, SINGLE, names)
    data = DatasetDict(train=rows, validation=rows)
    noisy = with_noise(data, 0.5)
    assert data["train"]["label"] == [1] * 600, "what is given is left as it was"
    counts = Counter(noisy["train"]["label"])
    # 150 expected of both; 5 standard deviations of a binomial are 43.
    assert counts[1] == 300 and abs(counts[0] - 150) < 43
    assert noisy["train"]["text"] == rows["text"] and noisy["train"].features == rows.features
    assert noisy["validation"] is rows and with_noise(data, 0.0) is data


@pytest.mark.parametrize(
    ("labels", "kind", "got"),
    [([0.5, 1.5], REGRESSION, "scores"), ([[1.0, 0.0], [1.0, 1.0]], MULTI, "several labels for one text")],
)
def test_what_has_no_wrong_class_is_refused(labels, kind, got):
    data = DatasetDict(train=with_labels(Dataset.from_dict({"text": ["x", "y"]}), labels, kind, ["a", "b"]))
    with pytest.raises(ValueError) as caught:
        with_noise(data, 0.4)
    assert str(caught.value) == (
        f"--label_noise: expected one class for each text, of which another is a wrong one, got {got}. Leave --label_noise out."
    )


def test_refusals_reach_the_user(planned, tmp_path):
    header, rows = FILES["stsb", "train.tsv"]
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(tmp_path / "data" / name, header, *(fields for fields, _ in rows))
    with pytest.raises(ValueError, match="--label_noise: expected one class for each text, .* got scores"):
        planned(run_glue, "--task_name", "stsb", "--data_dir", tmp_path / "data", "--label_noise", "0.2")
    with pytest.raises(ValueError, match=r"--label_noise: expected a share .* in \[0, 1\), got 40\.0"):
        planned(run_glue, *sst2(), "--label_noise", "40")
    with pytest.raises(ValueError, match=r"--train_val_split: expected a share between 0 and 1, got 10\."):
        planned(run_glue, *sst2(), "--train_val_split", "10")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x", "labels": [name]}) + "\n" for name in "aabb"))
    with pytest.raises(ValueError, match="--label_noise: expected one class .* got several labels for one text"):
        planned(run_classification, "--train_file", tmp_path / "a.jsonl", "--do_eval", "false", "--label_noise", "0.2")


# Runs


def short(tiny_bert, output_dir, *arguments):
    command = ["--model_name_or_path", tiny_bert, "--output_dir", output_dir, *sst2(), *BOTH, "--max_steps", "2"]
    return [*map(str, [*command, *arguments]), "--batch_size", "16", "--use_cpu", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def one_process(tiny_bert, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "one"
    run_glue.main(short(tiny_bert, output_dir, "--learning_rate", "1e-2"))
    return output_dir


def test_the_card_says_what_was_scored_and_that_labels_are_wrong(one_process):
    card = (one_process / "README.md").read_text()
    assert "| train, 25% held out | 200 | 2 | accuracy |" in card and "split: train, 25% held out" in card
    assert "- scored on 25% of the training rows, which were not trained on" in card
    assert "- of the training labels 40% were replaced at random" in card


def test_a_later_run_scores_the_same_rows(one_process, tmp_path):
    scored = run_glue.main(short(one_process, tmp_path / "out", "--do_train", "false", "--seed", "5"))
    trained = json.loads((one_process / "eval_results.json").read_text())
    assert (scored["eval_samples"], scored["eval_loss"]) == (200, trained["eval_loss"])


@pytest.mark.distributed
def test_two_processes_have_the_same_labels(one_process, tiny_bert, tmp_path):
    command = short(tiny_bert, tmp_path / "two", "--learning_rate", "1e-2")
    ran = run_script(ROOT / "glue" / "run_glue.py", *command, processes=2, folder=tmp_path / "ranks")
    assert all(each.returncode == 0 for each in ran), ran
    one, two = (load_file(folder / "model.safetensors") for folder in (one_process, tmp_path / "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_files_of_ones_own(planned, tmp_path):
    rows = [
        (f"the plot is {word}, {n}", label) for n in range(16) for word, label in (("dull", "bad"), ("vivid", "good"))
    ]
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "learn.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    given = ["--train_file", tmp_path / "data" / "learn.csv", "--train_val_split", "0.25"]
    clean, noisy = (planned(run_classification, *given, "--label_noise", share) for share in (0, 0.4))
    assert (len(noisy.train), len(noisy.scored)) == (24, 8)
    assert changed(noisy.train, clean.train) == 10 and changed(noisy.scored, clean.scored) == 0
    other = planned(run_classification, *given, "--label_noise", "0.4", "--seed", "3")
    assert changed(other.train, noisy.train) == changed(other.scored, noisy.scored) == 0
    assert noisy.dataset_split == "train, 25% held out"
    assert "of the training labels 40% were replaced at random" in noisy.remarks


@pytest.mark.parametrize("script", [run_glue, run_classification])
def test_the_help_says_whose_labels_and_which_rows(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "round(share * n) get a wrong label, the same ones the same labels whatever --seed is" in text
    assert "to score on and not to train on, in the place of a dev set: of each class the same share" in text
