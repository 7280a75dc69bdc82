"""`glue/run_glue.py`: its arguments and messages, and whole runs of a small BERT on one and two processes."""

import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
import run_glue
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from glue_arguments import make_parser, parse_args
from glue_tsv import read_glue_folder
from make_sample import make_tiny_bert
from safetensors.torch import load_file
from tasks import HUB_DATASET, TASKS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .ranks import run_script
from .test_glue_tasks import FILES, write_tsv


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


# Arguments


@pytest.mark.parametrize("task_name", TASKS)
def test_the_defaults_are_the_papers_for_the_task(task_name, tmp_path):
    _, training_args = parse_args(["--task_name", task_name, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert {name: getattr(training_args, name) for name in TASKS[task_name].paper_settings} == TASKS[
        task_name
    ].paper_settings
    assert training_args.method == "sampa"
    assert training_args.optim in ("adamw_torch", "adamw_torch_fused")
    assert training_args.report_to == []


def test_what_is_given_explicitly_wins(tmp_path):
    given = ["--rho", "0.05", "--num_train_epochs", "2", "--lmbda", "0", "--batch_size", "8"]
    _, args = parse_args(["--task_name=rte", "--output_dir", str(tmp_path / "out"), "--use_cpu", *given])
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


# Model and data


def test_a_folder_without_weights_is_trained_from_scratch(tiny_bert, caplog):
    with caplog.at_level(logging.WARNING):
        model = run_glue.load_model(str(tiny_bert), TASKS["mnli"])
    assert f"{tiny_bert} holds no weights: the model is trained from scratch." in caplog.text
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}


def test_weights_are_loaded_in_full_precision(tiny_bert, tmp_path, caplog):
    saved = run_glue.load_model(str(tiny_bert), TASKS["sst2"]).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    caplog.clear()
    model = run_glue.load_model(str(tmp_path), TASKS["sst2"])
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert torch.equal(model.classifier.weight, saved.classifier.weight.float())
    assert "from scratch" not in caplog.text


def test_without_a_folder_the_task_comes_from_the_hub(tiny_bert, tmp_path, monkeypatch):
    features = Features(sentence=Value("string"), label=ClassLabel(names=["negative", "positive"]), idx=Value("int32"))
    rows = {"sentence": ["the plot is dull", "the plot is vivid"] * 4, "label": [0, 1] * 4, "idx": list(range(8))}
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_dict(rows, features=features))
    asked = []
    monkeypatch.setattr(run_glue, "load_dataset", lambda *args: asked.append(args) or DatasetDict(splits))
    command = sample_run(tiny_bert, tmp_path / "out", "--batch_size", "4", "--max_steps", "1")
    place = command.index("--data_dir")
    metrics = run_glue.main(command[:place] + command[place + 2 :])
    assert asked == [(HUB_DATASET, "sst2")]
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
