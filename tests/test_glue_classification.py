"""`glue/run_classification.py`: whole runs of a small BERT on files and data sets of one's own."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import run_classification
import run_glue
import torch
from classification_arguments import make_parser, parse_args
from make_sample import make_tiny_bert
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, ViTConfig

from .ranks import run_script


ROOT = Path(__file__).parents[1]
WORDS = {"bad": ["dull", "ugly", "boring"], "good": ["vivid", "moving", "witty"], "neither": ["film", "plot", "cast"]}
# Every third row is of one class; quotes and commas are in some.
ROWS = [(f'the "plot" is {WORDS[label][n % 3]}, {n}', label) for n in range(16) for label in WORDS]


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_csv(folder / "train.csv", ("review", "opinion"), *ROWS)
    write_csv(folder / "dev.csv", ("review", "opinion"), *ROWS[:13])
    write_csv(folder / "new.csv", ("review",), *([text] for text, _ in ROWS[:7]))
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder with configuration and tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    make_tiny_bert(folder, hidden_size=16, num_layers=1, dropout=0.1)
    return str(folder)


def run(output_dir, *arguments):
    return [
        *("--output_dir", str(output_dir), "--use_cpu", "--disable_tqdm", "true", "--batch_size", "8", "--max_steps", "4"),
        *("--logging_steps", "1", "--learning_rate", "1e-2", "--save_strategy", "no", *map(str, arguments)),
    ]  # fmt: skip


def of_files(files, tiny_bert):
    return [
        "--train_file",
        files / "train.csv",
        "--validation_file",
        files / "dev.csv",
        "--model_name_or_path",
        tiny_bert,
    ]


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(files, tiny_bert, tmp_path_factory):
    """Output folder of a SAMPa run on one process, with predictions."""
    output_dir = tmp_path_factory.mktemp("runs") / "one"
    predict = ["--do_predict", "--test_file", files / "new.csv"]
    run_classification.main(run(output_dir, *of_files(files, tiny_bert), *predict))
    return output_dir


def test_a_csv_of_three_classes_becomes_a_scored_model_with_names(trained):
    config = AutoConfig.from_pretrained(trained)
    assert config.id2label == {0: "bad", 1: "good", 2: "neither"} and config.label2id["neither"] == 2
    assert config.problem_type == "single_label_classification"
    results = read_json(trained / "all_results.json")
    assert results["eval_accuracy"] in [n / 13 for n in range(14)] and results["eval_f1_macro"] <= 1
    card = (trained / "README.md").read_text()
    assert "trained on the local files train.csv and dev.csv" in card and re.search(
        r"\| validation \| 13 \| 4 \| accuracy \|", card
    )


def test_it_predicts_what_plain_transformers_do(trained):
    with (trained / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(n) for n in range(7)]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(trained),
        AutoTokenizer.from_pretrained(trained),
    )
    with torch.no_grad():
        inputs = tokenizer([text for text, _ in ROWS[:7]], padding=True, return_tensors="pt")
        probabilities = model.eval()(**inputs).logits.softmax(-1)
    assert [row["prediction"] for row in rows] == [model.config.id2label[int(i)] for i in probabilities.argmax(-1)]
    for row, expected in zip(rows, probabilities, strict=True):
        written = [float(row[f"probability_{name}"]) for name in ("bad", "good", "neither")]
        assert written == pytest.approx(expected.tolist(), abs=2e-6)


@pytest.mark.distributed
def test_two_processes_train_score_and_predict_as_one(trained, files, tiny_bert, tmp_path):
    command = run(tmp_path / "two", *of_files(files, tiny_bert), "--do_predict", "--test_file", files / "new.csv")
    ran = run_script(ROOT / "glue" / "run_classification.py", *command, processes=2, folder=tmp_path / "ranks")
    assert all(each.returncode == 0 for each in ran), ran
    assert (tmp_path / "two" / "predictions.csv").read_text() == (trained / "predictions.csv").read_text()
    one, two = (read_json(folder / "eval_results.json") for folder in (trained, tmp_path / "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    assert {name: two[name] for name in ("eval_accuracy", "eval_f1_macro")} == {
        name: one[name] for name in ("eval_accuracy", "eval_f1_macro")
    }
    assert (
        sum(
            each.stdout.count(
                "Texts: review. Predicted: one of bad, good, neither. Rows: 48 in train, 13 in validation, 7 in test."
            )
            for each in ran
        )
        == 1
    )


def test_a_trained_model_is_scored_and_predicts_without_training_files(trained, files, tmp_path, capsys):
    """Labels are its classes, also in another case."""
    alone = run(tmp_path / "p", "--model_name_or_path", trained, "--do_train", "false", "--do_eval", "false")
    run_classification.main([*alone, "--do_predict", "--test_file", str(files / "new.csv")])
    assert (tmp_path / "p" / "predictions.csv").read_text() == (trained / "predictions.csv").read_text()
    expected = read_json(trained / "eval_results.json")
    for name, spell in (("same", str), ("upper", str.upper)):
        file = write_csv(
            tmp_path / f"{name}.csv", ("review", "opinion"), *((text, spell(label)) for text, label in ROWS[:13])
        )
        command = ["--model_name_or_path", trained, "--do_train", "false", "--validation_file", file]
        results = run_classification.main(run(tmp_path / name, *command))
        assert results["eval_accuracy"] == expected["eval_accuracy"], name
        assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6), name
    test = write_csv(tmp_path / "test.csv", ("review", "opinion"), *ROWS[:13])
    results = run_classification.main(
        [*alone, "--do_predict", "--test_file", test, "--output_dir", str(tmp_path / "t")]
    )
    assert results["test_accuracy"] == expected["eval_accuracy"], "a test file with labels is scored"


def test_classes_that_only_their_case_tells_apart_are_scored_apart(tiny_bert, tmp_path, caplog):
    """Of a model that says US of every text, half is right."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    names = {0: "US", 1: "us"}
    config = AutoConfig.from_pretrained(tiny_bert, id2label=names, label2id={name: i for i, name in names.items()})
    model = AutoModelForSequenceClassification.from_config(config)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.copy_(torch.tensor([1.0, 0.0]))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = write_csv(
        tmp_path / "a.csv", ("text", "label"), *((text, names[n % 2]) for n, (text, _) in enumerate(ROWS))
    )
    command = ["--model_name_or_path", tmp_path / "model", "--do_train", "false", "--validation_file", file]
    assert run_classification.main(run(tmp_path / "out", *command))["eval_accuracy"] == 0.5
    assert "no row has" not in caplog.text and "taken for" not in caplog.text


def test_a_model_without_a_trained_head_is_not_scored(files, tiny_bert, tmp_path):
    command = run(tmp_path, "--model_name_or_path", tiny_bert, "--do_train", "false", "--validation_file", write_csv(tmp_path / "a.csv", ("text", "label"), ("x", "0"), ("y", "1")))  # fmt: skip
    message = (
        f"--do_train false: expected a model that is trained for %s, got {re.escape(tiny_bert)}, whose head is new"
    )
    with pytest.raises(ValueError, match=message % "0, 1"):
        run_classification.main(command)
    write_csv(tmp_path / "a.csv", ("text", "label"), ("x", "good"), ("y", "bad"))
    with pytest.raises(ValueError, match=message % "bad, good"):
        run_classification.main(command)
    command = run(
        tmp_path, "--model_name_or_path", tiny_bert, "--do_train", "false", "--do_eval", "false", "--do_predict"
    )
    with pytest.raises(ValueError, match=message % "the classes of the data"):
        run_classification.main([*command, "--test_file", str(files / "new.csv")])


def test_a_model_for_images_is_named_as_that_before_its_tokenizer_is_missed(files, tmp_path):
    ViTConfig().save_pretrained(tmp_path / "vit")
    message = "expected a model for texts, got .*vit, one for images, of type vit"
    with pytest.raises(ValueError, match=message):
        run_classification.main(run(tmp_path / "out", *of_files(files, tmp_path / "vit")))
    with pytest.raises(ValueError, match=message):
        run_glue.main(run(tmp_path / "out", "--task_name", "rte", "--model_name_or_path", tmp_path / "vit"))


def test_part_of_the_training_rows_is_kept_to_score_on(files, tiny_bert, tmp_path):
    command = ["--train_file", files / "train.csv", "--train_val_split", "0.25", "--model_name_or_path", tiny_bert]
    results = run_classification.main(run(tmp_path / "out", *command))
    assert results["eval_samples"] == 12 and read_json(tmp_path / "out" / "train_results.json")["train_samples"] == 36
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- scored on 25% of the training rows, which were not trained on" in card


def test_several_labels_of_one_text(tiny_bert, tmp_path):
    records = [{"text": text, "labels": [label] + (["odd"] if n % 2 else [])} for n, (text, label) in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["--train_file", tmp_path / "a.jsonl", "--validation_file", tmp_path / "a.jsonl", "--model_name_or_path"]
    predict = ["--do_predict", "--test_file", tmp_path / "a.jsonl"]
    results = run_classification.main(run(tmp_path / "out", *command, tiny_bert, *predict, "--max_steps", "1"))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.problem_type == "multi_label_classification"
    assert list(config.id2label.values()) == ["bad", "good", "neither", "odd"]
    # A head that has learned nothing yet is undecided, and BCE is then ln 2.
    assert (
        results["eval_loss"] == pytest.approx(0.69, abs=0.1) and {"eval_f1_micro", "test_f1_macro"} <= results.keys()
    )


def test_a_score(tiny_bert, tmp_path):
    file = write_csv(tmp_path / "a.csv", ("text", "score"), *((text, n / 8) for n, (text, _) in enumerate(ROWS)))
    command = ["--train_file", file, "--validation_file", file, "--model_name_or_path", tiny_bert]
    results = run_classification.main(run(tmp_path / "out", *command, "--do_predict", "--test_file", file))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.problem_type == "regression" and config.id2label == {0: "score"}
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-5) and "eval_pearson" in results
    with (tmp_path / "out" / "predictions.csv").open() as file:
        predicted = [float(row["prediction"]) for row in csv.DictReader(file)]
    assert sum((p - n / 8) ** 2 for n, p in enumerate(predicted)) / 48 == pytest.approx(results["eval_mse"], rel=1e-4)


@pytest.mark.parametrize("name", ["acc", "eval_f1"])
def test_a_score_that_no_evaluation_has_is_refused_before_the_first_step(name, files, tiny_bert, tmp_path):
    best = ["--early_stopping_patience", "2", "--save_strategy", "epoch", "--metric_for_best_model", name]
    with pytest.raises(ValueError) as caught:
        run_classification.main(run(tmp_path / "out", *of_files(files, tiny_bert), *best))
    assert str(caught.value) == (
        "--metric_for_best_model: expected what an evaluation of this run finds, loss, accuracy, f1_macro, got "
        f"{name.removeprefix('eval_')}. Give one of these."
    )
    assert not list((tmp_path / "out").iterdir())


def test_of_errors_the_smallest_is_the_best(tmp_path):
    def better(name, *words):
        best = ["--train_file", "a", "--metric_for_best_model", name, *words]
        return parse_args(run(tmp_path / "out", *best))[-1].greater_is_better

    assert [better(name) for name in ("mse", "eval_mae", "r2", "loss")] == [False, False, True, False]
    assert better("mse", "--greater_is_better", "true")


def test_a_data_set_by_its_name(tiny_bert, tmp_path):
    """As from the Hub: here from a folder, which `load_dataset` takes as well."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        write_csv(folder / f"{split}.csv", ("review", "opinion"), *ROWS)
    command = ["--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--model_name_or_path", tiny_bert]
    with pytest.raises(ValueError) as caught:
        run_classification.main(run(tmp_path / "out", *command))
    assert str(caught.value) == (
        f"--validation_split_name: expected one of the splits of {folder}, 'train', 'test', got 'validation' for the rows to score "
        "on. Name one of these, take some of the training rows with --train_val_split 0.1, or add --do_eval false."
    )
    results = run_classification.main(run(tmp_path / "out", *command, "--validation_split_name", "test"))
    assert results["eval_samples"] == 48
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained on the local folder data" in card and "| test | 48 |" in card


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected --train_file (or --validation_file, --test_file), or --dataset_name, got neither."),
        (["--train_file", "a", "--dataset_name", "b"], "or --dataset_name, got --dataset_name and --train_file."),
        (["--train_file", "a", "--train_val_split", "1"], "--train_val_split: expected a share between 0 and 1, got 1."),
        (["--train_file", "a", "--train_val_split", "0.1", "--validation_file", "b"], "--train_val_split: there is a --vali"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_args(run(tmp_path / "out", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--train_file: expected the rows to train on. Name a file, or add --do_train false."),
        (["--train_file", "new.csv"], "--validation_file: expected the rows to score on. Name a file, take some of the training"),
        (["--train_file", "new.csv", "--do_eval", "false", "--do_predict"], "--test_file: expected the rows to predict."),
        (["--train_file", "new.csv", "--do_eval", "false"], "--label_column_name: expected a column with the labels; new.csv"),
    ],
)  # fmt: skip
def test_what_a_run_needs_is_asked_for(arguments, message, files, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    more = [] if "--train_file" in arguments else ["--validation_file", "dev.csv"]
    with pytest.raises(ValueError, match=re.escape(message)):
        run_classification.main(run(tmp_path / "out", *arguments, *more, "--model_name_or_path", tiny_bert))


def test_counted_classes_are_not_those_of_a_trained_head(trained, files, tmp_path):
    """The numbers may mean anything: a head that has names keeps them, and is scored, only for the same names."""
    file = write_csv(
        tmp_path / "a.csv", ("review", "opinion"), *((text, list(WORDS).index(label)) for text, label in ROWS)
    )
    command = run(tmp_path / "out", "--train_file", file, "--do_eval", "false", "--model_name_or_path", trained)
    with pytest.raises(ValueError, match=r"3 classes of the data, 0, 1, 2, or .* Add --ignore_mismatched_sizes"):
        run_classification.main(command)
    score = ["--do_train", "false", "--validation_file", file, "--model_name_or_path", trained]
    with pytest.raises(
        ValueError, match=r"a\.csv: expected the names of the model's classes, .* the numbers '0', '1', '2'"
    ):
        run_classification.main(run(tmp_path / "scores", *score))
    run_classification.main([*command, "--ignore_mismatched_sizes"])
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "0", 1: "1", 2: "2"}


def test_a_file_that_is_not_read_is_named(files, tiny_bert, tmp_path, caplog):
    command = run(tmp_path / "out", *of_files(files, tiny_bert), "--max_steps", "1", "--test_file", files / "none.csv")
    run_classification.main(command)
    assert "--test_file is not read without --do_predict." in caplog.text


def test_a_class_that_is_only_scored_is_refused(files, tiny_bert, tmp_path):
    odd = write_csv(tmp_path / "odd.csv", ("review", "opinion"), ("x", "good"), ("y", "god"))
    with pytest.raises(
        ValueError, match=r"odd.csv, line 3: expected one of the classes .*'bad', 'good', 'neither', .* 'god'"
    ):
        run_classification.main(run(tmp_path / "out", *of_files(files, tiny_bert), "--validation_file", odd))


def test_the_commands_of_the_docstring_are_understood():
    blocks = re.findall(r"^ {4}(\S(?:[^\\\n]|\\\n)*)", run_classification.__doc__, flags=re.MULTILINE)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    assert len(commands) == 4
    for words in commands:
        place = words.index("glue/run_classification.py")
        assert all((ROOT / word).is_file() for word in words[: place + 1] if word.endswith((".yaml", ".py")))
        make_parser().parse_args(words[place + 1 :])


def test_a_configuration_that_there_is_not_is_named(tiny_bert, tmp_path):
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", ("text", "label"), ("x", "a"), ("y", "b"))
    command = [
        "--dataset_name",
        tmp_path / "data",
        "--dataset_config_name",
        "small",
        "--model_name_or_path",
        tiny_bert,
    ]
    with pytest.raises(ValueError, match="--dataset_config_name: BuilderConfig 'small' not found"):
        run_classification.main(run(tmp_path / "out", *command, "--cache_dir", tmp_path / "cache"))


def test_the_help_can_be_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        run_classification.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "multi_label_classification: f1_micro, f1_macro, precision_micro, recall_micro, exact_match" in text
