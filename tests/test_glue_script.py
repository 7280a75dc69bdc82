"""`glue/run_glue.py`: its arguments and messages, and whole runs of a small BERT on one and two processes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import glue_data
import numpy as np
import pytest
import run_glue
import torch
from datasets import ClassLabel, Dataset, Features, Value
from glue_arguments import make_parser, parse_args
from glue_submission import predictions_of
from glue_tsv import read_glue_folder
from make_sample import make_tiny_bert
from safetensors.torch import load_file
from tasks import HUB_DATASET, TASKS
from text_arguments import TextArguments
from text_inputs import longest_input, tokenize
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from .ranks import run_script
from .test_glue_tasks import FILES, write_official, write_tsv


ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "glue" / "sample"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder with configuration and tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    make_tiny_bert(folder, hidden_size=16, num_layers=1, dropout=0.1)
    return folder


def sample_run(tiny_bert, output_dir, *arguments):
    """Command line of four steps on the first rows of the sample."""
    return [
        *("--task_name", "sst2", "--data_dir", str(SAMPLE), "--model_name_or_path", str(tiny_bert)),
        *("--output_dir", str(output_dir), "--max_train_samples", "40", "--max_eval_samples", "50", "--batch_size", "16"),
        *("--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2", "--use_cpu", "--disable_tqdm", "true"),
        *arguments,
    ]  # fmt: skip


def read_json(path):
    return json.loads(path.read_text())


def step_logs(output_dir):
    return [entry for entry in read_json(output_dir / "trainer_state.json")["log_history"] if "loss" in entry]


def assert_same_weights(folder, other):
    weights, others = (load_file(path / "model.safetensors") for path in (folder, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_score_that_no_evaluation_has_is_refused_before_the_first_step(tiny_bert, tmp_path):
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model")
    with pytest.raises(ValueError) as caught:
        run_glue.main(sample_run(tiny_bert, tmp_path / "out", *best, "acuracy"))
    assert str(caught.value) == (
        "--metric_for_best_model: expected what an evaluation of this run finds, loss, accuracy, got acuracy. Give one of "
        "these."
    )
    assert not list((tmp_path / "out").iterdir())


# Arguments


@pytest.mark.parametrize("task_name", TASKS)
def test_the_defaults_are_the_papers_for_the_task(task_name, tmp_path):
    *_, training_args = parse_args(["--task_name", task_name, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert {name: getattr(training_args, name) for name in TASKS[task_name].paper_settings} == TASKS[
        task_name
    ].paper_settings
    assert training_args.method == "sampa"
    assert training_args.optim in ("adamw_torch", "adamw_torch_fused")
    assert training_args.report_to == []


def test_what_is_given_explicitly_wins(tmp_path):
    given = ["--rho", "0.05", "--num_train_epochs", "2", "--lmbda", "0", "--batch_size", "8"]
    *_, args = parse_args(["--task_name=rte", "--output_dir", str(tmp_path / "out"), "--use_cpu", *given])
    assert (args.rho, args.num_train_epochs, args.lmbda, args.batch_size) == (0.05, 2, 0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task_name", "snli"], "argument --task_name/--task-name: invalid choice: 'snli' (choose from"),
        ([], "the following arguments are required: --task_name/--task-name"),
        (["--task_name", "rte", "--method", "sgd"], "argument --method: invalid choice: 'sgd' (choose from"),
        (["--task_name", "rte", "--rho", "x"], "argument --rho: invalid float value: 'x'"),
    ],
)
def test_the_parser_refuses_what_it_does_not_know(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert message in capsys.readouterr().err


def test_the_help_can_be_printed_and_names_the_papers_settings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # argparse also wraps at hyphens
    with pytest.raises(SystemExit) as caught:
        run_glue.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "by task cola: rho 0.01; mrpc: num_train_epochs 5; stsb: rho 0.005; rte: rho 0.005; wnli:" in text
    assert re.search(r"--lmbda LMBDA .*?\(default: (.*?)\)", text[text.index("options:") :])[1] == "0.1"
    assert re.search(r"--batch_size BATCH_SIZE.*?\(default: (.*?)\)", text)[1] == "32"


def test_the_commands_of_the_docstring_are_understood():
    blocks = re.findall(r"^ {4}(\S(?:[^\\\n]|\\\n)*)", run_glue.__doc__, flags=re.MULTILINE)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    scripts = [next(word for word in words if word.endswith(".py")) for words in commands]
    assert scripts == ["glue/run_glue.py", "glue/run_glue.py", "glue/make_sample.py", "glue/run_glue.py"]
    for words, script in zip(commands, scripts, strict=True):
        before, arguments = words[: words.index(script)], words[words.index(script) + 1 :]
        assert all((ROOT / word).is_file() for word in [*before, script] if word.endswith((".yaml", ".py")))
        if script == "glue/run_glue.py":
            assert make_parser().parse_args(arguments).task_name in TASKS


def test_an_output_dir_that_holds_something_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match=rf"--output_dir {tmp_path} is not empty.*--resume_from_checkpoint true"):
        run_glue.main(["--task_name", "rte", "--use_cpu", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("spelling", "name"), [("SST-2", "sst2"), ("STS-B", "stsb"), ("MNLI", "mnli"), ("CoLA", "cola"), ("sst_2", "sst2")]
)
def test_a_task_has_its_name_in_any_spelling(spelling, name, tmp_path):
    _, glue_args, _ = parse_args(["--task_name", spelling, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert glue_args.task_name == name


@pytest.mark.parametrize("name", ["max_length", "max_train_samples", "max_eval_samples", "max_predict_samples"])
def test_numbers_that_leave_nothing_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"--{name}: expected a positive number, got 0."):
        parse_args(["--task_name", "rte", "--output_dir", str(tmp_path / "out"), "--use_cpu", f"--{name}", "0"])


# Model and data


def test_a_folder_without_weights_is_trained_from_scratch(one_process, tiny_bert):
    config = AutoConfig.from_pretrained(one_process)
    assert config.id2label == {0: "negative", 1: "positive"}
    assert config.label2id == {"negative": 0, "positive": 1}


def write_rte(folder):
    for name in ("train.tsv", "dev.tsv"):
        write_official(folder / "RTE" / name, "rte")
    return str(folder / "RTE")


def permuted(folder, to):
    """The same model, with its two classes in the other order."""
    shutil.copytree(folder, to)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for param in (model.classifier.weight, model.classifier.bias):
            param.copy_(param.flip(0))
    model.config.id2label = {0: "positive", 1: "negative"}
    model.config.label2id = {"positive": 0, "negative": 1}
    model.save_pretrained(to)
    return to


def test_a_model_with_its_classes_in_another_order_scores_the_same(one_process, tmp_path):
    other = permuted(one_process, tmp_path / "other")
    run_glue.main(sample_run(other, tmp_path / "out", "--do_train", "false"))
    scored, trained = (read_json(folder / "eval_results.json") for folder in (tmp_path / "out", one_process))
    assert scored["eval_accuracy"] == trained["eval_accuracy"] != 0.5
    assert scored["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)


def test_a_model_for_other_classes_is_refused(one_process, tmp_path):
    with pytest.raises(ValueError, match=r"2 classes of the data, entailment, not_ent.* --ignore_mismatched_sizes"):
        run_glue.main(
            sample_run(one_process, tmp_path / "out", "--task_name", "rte", "--data_dir", write_rte(tmp_path))
        )


def test_without_a_folder_the_task_comes_from_the_hub(tiny_bert, tmp_path, monkeypatch):
    features = Features(sentence=Value("string"), label=ClassLabel(names=["negative", "positive"]), idx=Value("int32"))
    rows = {"sentence": ["the plot is dull", "the plot is vivid"] * 4, "label": [0, 1] * 4, "idx": list(range(8))}
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_dict(rows, features=features))
    asked = []
    monkeypatch.setattr(glue_data, "load_dataset", lambda *args, split: asked.append((*args, split)) or splits[split])
    command = sample_run(tiny_bert, tmp_path / "out", "--batch_size", "4", "--max_steps", "1")
    place = command.index("--data_dir")
    metrics = run_glue.main(command[:place] + command[place + 2 :])
    assert asked == [(HUB_DATASET, "sst2", "train"), (HUB_DATASET, "sst2", "validation")]
    assert metrics["eval_accuracy"] in [n / 8 for n in range(9)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {HUB_DATASET}" in card
    assert "This model was trained on GLUE sst2. It" in card, "the folder has no weights to start from"


# Runs


@pytest.fixture(scope="module")
def one_process(tiny_bert, tmp_path_factory):
    """Output folder of a SAMPa run on one process."""
    output_dir = tmp_path_factory.mktemp("runs") / "one"
    run_glue.main(sample_run(tiny_bert, output_dir))
    return output_dir


def test_a_run_leaves_model_and_metrics(one_process):
    assert {path.name for path in one_process.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin"),
        *("trainer_state.json", "train_results.json", "eval_results.json", "all_results.json", "README.md"),
    }  # fmt: skip
    train, results = (read_json(one_process / f"{name}_results.json") for name in ("train", "eval"))
    assert train["train_loss"] > 0 and train["epoch"] == pytest.approx(4 / 3)
    assert read_json(one_process / "all_results.json") == train | results
    logs = step_logs(one_process)
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    assert logs[0].keys() >= {"loss", "perturbed_loss", "sharpness", "grad_norm", "ascent_grad_norm", "ascent_cosine"}


def test_the_saved_model_scores_the_same_with_plain_transformers(one_process):
    model = AutoModelForSequenceClassification.from_pretrained(one_process).eval()
    tokenizer = AutoTokenizer.from_pretrained(one_process)
    rows = read_glue_folder(SAMPLE, TASKS["sst2"])["validation"][:50]
    with torch.no_grad():
        logits = model(**tokenizer(rows["sentence"], padding=True, return_tensors="pt")).logits
    accuracy = (logits.argmax(-1) == torch.tensor(rows["label"])).float().mean().item()
    assert read_json(one_process / "eval_results.json")["eval_accuracy"] == pytest.approx(accuracy)
    assert model.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.distributed
def test_two_processes_end_with_the_same_bits(one_process, tiny_bert, tmp_path):
    output_dir = tmp_path / "two"
    command = [ROOT / "glue" / "run_glue.py", *sample_run(tiny_bert, output_dir)]
    first, second = run_script(*command, processes=2, folder=tmp_path / "ranks")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert_same_weights(output_dir, one_process)
    timings = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    one, two = (
        [{k: v for k, v in log.items() if k not in timings} for log in step_logs(d)] for d in (one_process, output_dir)
    )
    assert one == two
    accuracy = [read_json(folder / "eval_results.json")["eval_accuracy"] for folder in (one_process, output_dir)]
    assert accuracy[0] == accuracy[1]
    # The main process speaks for both.
    assert (first.stderr + second.stderr).count("holds no weights") == 1
    assert (first.stdout + second.stdout).count("***** eval metrics *****") == 1


@pytest.mark.parametrize(
    ("method", "variant"),
    [("sampa", "vasso"), ("sampa", "bisam"), ("sam", "slsam"), ("sam", "ausam"), ("sam", "looksam"), ("sam", "gnp")],
)
def test_a_run_with_a_variant(method, variant, tiny_bert, tmp_path):
    """One of every part."""
    weights = {}
    for name in (variant, "sam"):
        run_glue.main(sample_run(tiny_bert, tmp_path / name, "--method", method, "--variant", name))
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        assert len(step_logs(tmp_path / name)) == 4
    assert not all(torch.equal(value, weights["sam"][name]) for name, value in weights[variant].items())
    card = (tmp_path / variant / "README.md").read_text()
    assert f"- variant: {variant}" in card


def test_a_run_goes_on_from_its_last_checkpoint(one_process, tiny_bert, tmp_path):
    shutil.copytree(one_process / "checkpoint-3", tmp_path / "checkpoint-3")
    run_glue.main(sample_run(tiny_bert, tmp_path, "--resume_from_checkpoint", "true"))
    assert_same_weights(tmp_path, one_process)


def test_a_model_can_be_scored_without_training(one_process, tmp_path):
    run_glue.main(sample_run(one_process, tmp_path, "--do_train", "false"))
    scored, trained = (read_json(folder / "eval_results.json") for folder in (tmp_path, one_process))
    assert scored["eval_accuracy"] == trained["eval_accuracy"]
    assert scored["eval_loss"] == trained["eval_loss"]
    assert {path.name for path in tmp_path.iterdir()} == {"eval_results.json", "all_results.json"}


@pytest.mark.parametrize("method", ["adamw", "sam", "sampa"])
def test_micro_batches_add_up_to_the_update_batch(method, tmp_path):
    make_tiny_bert(tmp_path / "model", hidden_size=16, num_layers=1, dropout=0.0)
    logs = []
    for accumulation in ("1", "4"):
        output_dir = tmp_path / accumulation
        command = sample_run(tmp_path / "model", output_dir, "--method", method, "--max_steps", "2")
        run_glue.main([*command, "--gradient_accumulation_steps", accumulation])
        logs.append(step_logs(output_dir))
    for whole, split in zip(*logs, strict=True):
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        assert ("sharpness" in whole) == (method != "adamw")


@pytest.mark.parametrize("task_name", TASKS)
def test_every_task_trains_and_is_scored_with_its_metrics(task_name, tiny_bert, tmp_path):
    task = TASKS[task_name]
    for name in task.files.values():
        header, rows = FILES.get((task_name, name)) or FILES[task_name, "train.tsv"]
        write_tsv(tmp_path / "data" / name, *([header] if header else []), *(fields for fields, _ in rows * 4))
    command = ["--task_name", task_name, "--data_dir", str(tmp_path / "data"), "--model_name_or_path", str(tiny_bert)]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no", "--use_cpu"]
    run_glue.main([*command, "--batch_size", "4", "--disable_tqdm", "true"])
    results = read_json(tmp_path / "out" / "eval_results.json")
    prefixes = ["eval_matched_", "eval_mismatched_"] if task_name == "mnli" else ["eval_"]
    bookkeeping = ("loss", "runtime", "samples", "samples_per_second", "steps_per_second")
    assert results.keys() == {"epoch", *(p + m for p in prefixes for m in (*task.metrics, *bookkeeping))}
    for prefix in prefixes:
        assert all(-1 <= results[prefix + metric] <= 1 for metric in task.metrics)


def test_a_length_above_the_models_is_warned_of(tiny_bert, caplog):
    config, tokenizer = AutoConfig.from_pretrained(tiny_bert), AutoTokenizer.from_pretrained(tiny_bert)
    for asked, allowed in ((64, 64), (128, 128), (1000, 128)):
        caplog.clear()
        assert longest_input(TextArguments(max_length=asked), tokenizer, config) == allowed
        warned = (
            "--max_length 1000 is above the longest input of the model, 128 tokens: inputs are truncated to these."
        )
        assert (warned in caplog.text) == (asked > allowed)


def test_padding_to_the_longest_input_changes_no_score(one_process, tmp_path):
    run_glue.main(sample_run(one_process, tmp_path, "--do_train", "false", "--pad_to_max_length"))
    scored, trained = (read_json(folder / "eval_results.json") for folder in (tmp_path, one_process))
    assert scored["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    data = Dataset.from_dict({"sentence": ["the plot is dull", "vivid"]})
    tokenizer = AutoTokenizer.from_pretrained(one_process)
    assert {len(ids) for ids in tokenize(data, ["sentence"], tokenizer, 32, pad=True)["input_ids"]} == {32}


def test_the_card_names_what_was_left_out_and_no_more(one_process, tiny_bert, tmp_path):
    card = (one_process / "README.md").read_text()
    assert "- starting from random weights" in card
    assert "- trained on the first 40 of 800 examples of train only" in card
    assert "- scored on the first 50 of 200 examples of validation only" in card
    assert "truncated" not in card, "no sentence is so long"
    run_glue.main(sample_run(tiny_bert, tmp_path, "--max_length", "8", "--max_eval_samples", "10000"))
    card = (tmp_path / "README.md").read_text()
    assert "- inputs are truncated to 8 tokens" in card and "scored on the first" not in card


# Predictions


def without_labels(folder, task_name):
    """The test files of a task, with its training texts."""
    task = TASKS[task_name]
    header, rows = FILES[task_name, "train.tsv"]
    places = [list(header or task.tsv_header).index(column) for column in task.tsv_columns.values()]
    for name in task.test_files.values():
        numbered = [[str(10 + n), *(fields[place] for place in places)] for n, (fields, _) in enumerate(rows)]
        write_tsv(folder / name, [task.tsv_index, *task.tsv_columns.values()], *numbered)
    return folder


@pytest.fixture(scope="module")
def heads(tiny_bert, tmp_path_factory):
    """For a number of labels a model without training."""

    def of(task_name):
        folder = tmp_path_factory.mktemp(task_name)
        names = dict(enumerate(TASKS[task_name].labels or ("score",)))
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tiny_bert, id2label=names, label2id={n: i for i, n in names.items()})
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
        return folder

    return of


@pytest.mark.parametrize(
    ("task_name", "files"),
    [("cola", ["CoLA.tsv"]), ("sst2", ["SST-2.tsv"]), ("mrpc", ["MRPC.tsv"]), ("stsb", ["STS-B.tsv"]), ("qqp", ["QQP.tsv"])]
    + [("mnli", ["MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"]), ("qnli", ["QNLI.tsv"]), ("rte", ["RTE.tsv"])]
    + [("wnli", ["WNLI.tsv"])],
)  # fmt: skip
def test_predictions_are_written_as_the_benchmark_takes_them(task_name, files, heads, tmp_path):
    """It needs neither train.tsv nor dev.tsv, and what is written is what plain transformers predict."""
    task, folder, data = TASKS[task_name], heads(task_name), without_labels(tmp_path / "data", task_name)
    command = ["--task_name", task_name, "--data_dir", str(data), "--model_name_or_path", str(folder), "--use_cpu"]
    metrics = run_glue.main(
        [*command, "--output_dir", str(tmp_path / "out"), "--do_train", "false", "--do_eval", "false", "--do_predict"]
    )
    assert not any("accuracy" in name or "pearson" in name for name in metrics)
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), [row for _, row in FILES[task_name, "train.tsv"][1]]
    texts = [[row[column] for row in rows] for column in task.text_columns]
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        logits = model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits
    if task_name == "stsb":
        expected = [f"{score:.3f}" for score in logits[:, 0].clip(0, 5)]
    else:
        in_words = task_name in ("mnli", "qnli", "rte")
        expected = [task.labels[i] if in_words else str(int(i)) for i in logits.argmax(-1)]
    lines = [f"{10 + n}\t{prediction}" for n, prediction in enumerate(expected)]
    for name in files:
        assert (tmp_path / "out" / name).read_text().splitlines() == ["index\tprediction", *lines]


def test_predictions_are_of_the_tasks_classes_whatever_their_order_in_the_model(one_process, tmp_path):
    write_tsv(tmp_path / "data" / "test.tsv", ["index", "sentence"], *([str(n), f"the plot is {word}"] for n, word in enumerate(["dull", "vivid", "ugly", "moving"])))  # fmt: skip
    written = []
    for folder in (one_process, permuted(one_process, tmp_path / "other")):
        command = sample_run(folder, tmp_path / folder.name / "out", "--data_dir", str(tmp_path / "data"))
        run_glue.main([*command, "--do_train", "false", "--do_eval", "false", "--do_predict"])
        written.append((tmp_path / folder.name / "out" / "SST-2.tsv").read_text())
    assert written[0] == written[1] and len(written[0].splitlines()) == 5


@pytest.mark.distributed
def test_two_processes_predict_what_one_does(one_process, tmp_path):
    words = "dull vivid ugly moving lazy".split()
    write_tsv(tmp_path / "data" / "test.tsv", ["index", "sentence"], *([str(n), f"the plot is {word}"] for n, word in enumerate(words)))  # fmt: skip
    command = sample_run(one_process, tmp_path / "one", "--data_dir", str(tmp_path / "data"), "--do_predict")
    command += ["--do_train", "false", "--do_eval", "false"]
    run_glue.main(command)
    command[command.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    for ran in run_script(ROOT / "glue" / "run_glue.py", *command, processes=2, folder=tmp_path / "ranks"):
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "two" / "SST-2.tsv").read_text() == (tmp_path / "one" / "SST-2.tsv").read_text()


def test_scores_are_cut_to_the_range_of_the_task_and_nan_is_refused():
    logits = np.array([[-1.0], [2.34567], [7.0]])
    assert predictions_of(logits, TASKS["stsb"], (0,)) == ["0.000", "2.346", "5.000"]
    with pytest.raises(ValueError, match="Expected numbers from the model, got NaN for 1 of 2 examples"):
        predictions_of(np.array([[0.0, 1.0], [float("nan"), 0.0]]), TASKS["rte"], (0, 1))


def test_training_without_evaluation_needs_no_dev_file(tiny_bert, tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "data")
    (tmp_path / "data" / "dev.tsv").unlink()
    command = sample_run(tiny_bert, tmp_path / "out", "--data_dir", str(tmp_path / "data"), "--max_steps", "1")
    run_glue.main([*command, "--eval_strategy", "no", "--do_eval", "false"])
    with pytest.raises(FileNotFoundError, match="dev.tsv is not there"):
        run_glue.main([*command, "--overwrite_output_dir"])
