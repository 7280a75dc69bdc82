"""`hf_sampa.finetuning`, on which both scripts stand: the batch of an update, what the command line refuses, the run."""

import dataclasses
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import classification_arguments
import glue_arguments
import numpy as np
import pytest
import run_glue
import run_vit
import vit_arguments
from transformers import HfArgumentParser
from transformers.trainer_utils import PredictionOutput

from hf_sampa import SAMPaTrainingArguments
from hf_sampa.finetuning import UNUSED, FineTuningArguments, corrupt_labels, parse_arguments, train_and_score
from hf_sampa.finetuning.step_times import StepTimes
from hf_sampa.variants import VARIANTS


ROOT = Path(__file__).parents[1]


def training_arguments(tmp_path, **settings):
    return FineTuningArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def parse(tmp_path, *given):
    command = ["--output_dir", str(tmp_path), "--use_cpu", *given]
    return parse_arguments(HfArgumentParser(FineTuningArguments), command)[-1]


# The batch


def test_the_batch_size_is_that_of_an_update(tmp_path):
    assert training_arguments(tmp_path).per_device_train_batch_size == 32
    args = training_arguments(tmp_path, batch_size=24, gradient_accumulation_steps=4)
    assert args.per_device_train_batch_size == 6
    assert dataclasses.replace(args).per_device_train_batch_size == 6


@pytest.mark.parametrize(
    ("method", "world_size", "per_device"),
    [("adamw", 2, 8), ("sam", 2, 8), ("sampa", 2, 16), ("sampa", 4, 8), ("sampa", 1, 16)],
)
def test_the_processes_share_the_batch(method, world_size, per_device, tmp_path, monkeypatch):
    monkeypatch.setattr(FineTuningArguments, "world_size", world_size)
    monkeypatch.setattr(FineTuningArguments, "process_index", 0)
    args = training_arguments(tmp_path, method=method, batch_size=32, gradient_accumulation_steps=2)
    assert args.per_device_train_batch_size == per_device


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation", "message"),
    [
        (0, 1, 1, "number, got 0. Change it."),
        (10, 1, 4, "multiple of 4 (--gradient_accumulation_steps 4), got 10. Change it, or what it is shared by."),
        (1, 4, 1, "multiple of 2 (2 devices, a pair counting once), got 1. Change it, or what it is shared by."),
        (
            *(6, 4, 2),
            "multiple of 4 (2 devices, a pair counting once, times --gradient_accumulation_steps 2), got 6. Change it, or what it is "
            "shared by.",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(
    batch_size, world_size, accumulation, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(FineTuningArguments, "world_size", world_size)
    monkeypatch.setattr(FineTuningArguments, "process_index", 0)
    with pytest.raises(ValueError) as caught:
        training_arguments(tmp_path, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert str(caught.value) == f"--batch_size: expected a positive {message}"


def test_a_device_batch_size_that_contradicts_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="--batch_size 32 makes --per_device_train_batch_size 32 here, got 8. Leave it"
    ):
        training_arguments(tmp_path, per_device_train_batch_size=8)


# The command line


def test_the_docstring_and_the_help_name_what_is_new():
    new = {field.name for field in dataclasses.fields(FineTuningArguments)}
    new -= {field.name for field in dataclasses.fields(SAMPaTrainingArguments)}
    assert new == {
        *("batch_size", "overwrite_output_dir", "early_stopping_patience", "early_stopping_threshold", "ema_decay")
    }
    assert all(f"{name} (`" in FineTuningArguments.__doc__ for name in new | {"method"})
    assert set(UNUSED) == set(FineTuningArguments.METHODS)
    text = HfArgumentParser(FineTuningArguments).format_help()
    assert all(f"--{name}" in text for name in new)


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        (["--method", "adamw", "--rho", "0.3"], "--method adamw does not use --rho 0.3"),
        (["--method=adamw", "--lmbda=0", "--rho=0"], "--method adamw does not use --rho 0.0 or --lmbda 0.0"),
        (["--method", "sam", "--rho", "0.3", "--lmbda", "0.1"], "--method sam does not use --lmbda 0.1"),
        (["--method", "sampa", "--rho", "0.3", "--lmbda", "0.1"], None),
        (["--method", "adamw"], None),
        (["--method", "adamw", "--variant", "asam"], "--method adamw does not use --variant asam"),
        (["--method", "adamw", "--rho", "0.3", "--diagnostics_steps", "9"], None),
        (
            ["--method=adamw", "--rho=0.3", "--diagnostics_steps=9", "--diagnostics_radius=0.1"],
            "--method adamw does not use --rho 0.3",
        ),
    ],
)
def test_a_setting_that_the_method_does_not_use_is_a_warning(given, unused, tmp_path, caplog):
    parse(tmp_path, *given)
    warning = f"{unused}. Leave out what has no effect, or choose another --method."
    said = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    assert said == ([warning] if unused else [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scripts_take_every_variant(variant, tmp_path):
    """With rho as many times the script's as the variant's own is SAM's."""
    chosen = VARIANTS[variant]
    command = ["--method", chosen.timings[0], "--variant", variant, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    glue = glue_arguments.parse_args(["--task_name", "rte", *command])[-1]
    vit = vit_arguments.parse_args(command)[-1]
    sam = {"sampa": 0.1, "sam": 0.05}[chosen.timings[0]]
    assert (glue.rho, vit.rho) == (pytest.approx(0.005 * chosen.rho / 0.05), pytest.approx(sam * chosen.rho / 0.05))
    assert glue.lmbda == (0.1 if chosen.lmbda is None else chosen.lmbda)
    assert glue.variant_args == chosen.defaults
    assert vit_arguments.parse_args([*command, "--rho", "0.3"])[-1].rho == 0.3


def test_arguments_of_a_variant_on_the_command_line(tmp_path):
    args = parse(tmp_path, "--variant", "fsam", "--variant_args", "sigma=0.5", "lam=0.6")
    assert args.variant_args == {"sigma": 0.5, "lam": 0.6}


@pytest.mark.parametrize("method", FineTuningArguments.METHODS)
def test_the_scripts_warn_of_what_is_given_and_not_of_their_defaults(method, tmp_path, caplog):
    command = ["--method", method, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    glue = ["--task_name", "rte", *command]
    glue_arguments.parse_args(glue)
    vit_arguments.parse_args(command)
    assert not caplog.records
    glue_arguments.parse_args([*glue, "--lmbda", "0.1"])
    vit_arguments.parse_args([*command, "--lmbda", "0.1"])
    assert [f"--method {method} does not use --lmbda 0.1" in record.getMessage() for record in caplog.records] == (
        [] if method == "sampa" else [True, True]
    )


def test_an_output_dir_that_holds_something_is_refused(tmp_path):
    (tmp_path / "_run.json").touch()
    parse(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError) as caught:
        parse(tmp_path)
    assert str(caught.value) == (
        f"--output_dir {tmp_path} is not empty. Choose another folder, add --overwrite_output_dir, or continue the run "
        "in it with --resume_from_checkpoint true."
    )
    assert parse(tmp_path, "--overwrite_output_dir").overwrite_output_dir
    assert not parse(tmp_path, "--do_train", "false").do_train
    assert parse(tmp_path, "--resume_from_checkpoint", "true").resume_from_checkpoint is True
    assert parse(tmp_path, "--resume_from_checkpoint", "a/b").resume_from_checkpoint == "a/b"


@pytest.mark.parametrize("below", ["", "/run", "/run/one"])
@pytest.mark.parametrize("name", ["dev.csv", "link"])
def test_an_output_dir_that_is_no_folder_is_refused_at_the_start(name, below, tmp_path):
    (tmp_path / "dev.csv").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for words in ((), ("--do_train", "false"), ("--overwrite_output_dir",)):
        with pytest.raises(NotADirectoryError) as caught:
            parse(f"{tmp_path}/{name}{below}", *words)
        assert str(caught.value) == (
            f"--output_dir {tmp_path}/{name}{below}: expected a folder, or a name for one, got {tmp_path}/{name}, which is no folder. "
            "Choose another one."
        )


def test_a_run_is_not_continued_and_replaced(tmp_path):
    with pytest.raises(ValueError) as caught:
        parse(tmp_path, "--overwrite_output_dir", "--resume_from_checkpoint", "true")
    assert str(caught.value) == (
        "--resume_from_checkpoint true goes on with the run in --output_dir and --overwrite_output_dir replaces it: expected one of "
        "the two, got both. Leave one out."
    )


@pytest.mark.parametrize("checkpoint", ["true", "out/checkpoint-2"])
def test_a_run_that_does_not_train_goes_on_from_nothing(checkpoint, tmp_path):
    with pytest.raises(ValueError) as caught:
        parse(tmp_path, "--do_train", "false", "--resume_from_checkpoint", checkpoint)
    assert str(caught.value) == (
        f"--resume_from_checkpoint {checkpoint}: expected a run that trains, got --do_train false. Leave it out: the weights to score "
        "or predict with are those of --model_name_or_path, which may be a checkpoint."
    )


@pytest.mark.parametrize("script", [run_glue, run_vit])
def test_the_help_opens_with_what_to_type_and_what_it_does(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    usage, purpose, *_ = capsys.readouterr().out.split("\n\n")
    path = Path(script.__file__).relative_to(ROOT)
    launched, alone = (" ".join(command.split()) for command in usage.removeprefix("usage: ").split("or: "))
    assert re.fullmatch(rf"python -m hf_sampa launch {path} --.* --output_dir FOLDER \[options\]", launched)
    assert alone.startswith(f"python {path} --") and alone.endswith("--output_dir FOLDER [options]")
    purpose = " ".join(purpose.split())
    assert purpose.startswith("Fine-tune a") and "SAMPa (or --method sam, adamw)" in purpose
    assert purpose.endswith(f"at the top of {path}.")


@pytest.mark.parametrize("arguments", [glue_arguments, classification_arguments, vit_arguments])
def test_the_help_says_every_default_once_and_in_one_form(arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # argparse also wraps at hyphens
    ours = arguments.make_parser().format_help().split("\ntraining, as in transformers.TrainingArguments:")[0]
    options = {each.split()[0]: " ".join(each.split("\n\n")[0].split()) for each in re.split(r"\n  (?=--)", ours)[1:]}
    assert len(options) > 20
    for option in options.values():
        said = re.findall("default", option, flags=re.IGNORECASE)
        assert len(said) == len(re.findall(r" \(default: [^()]+(?:\([^()]*\)[^()]*)*\)$", option)) <= 1, option
    if arguments is vit_arguments:
        assert options["--max_image_pixels"].endswith("fills the memory. (default: 89478485)")
        assert options["--train_split_name"].endswith("Its split to train on. (default: train)")


# Label noise


@pytest.mark.parametrize(("n", "share", "wrong"), [(1000, 0.4, 400), (10, 0.25, 2), (7, 0.5, 4), (5, 0.0, 0)])
def test_exactly_the_share_of_labels_is_wrong_afterwards(n, share, wrong):
    labels = np.arange(n) % 10
    corrupted = corrupt_labels(labels, share, num_classes=10, seed=1)
    assert (corrupted != labels).sum() == wrong
    assert corrupted.min() >= 0 and corrupted.max() <= 9
    assert np.array_equal(labels, np.arange(n) % 10)  # the argument is left as it was


def test_label_noise_depends_on_the_seed_alone():
    labels = np.arange(500) % 10
    first = corrupt_labels(labels, 0.4, 10, seed=3)
    np.random.seed(99)
    assert np.array_equal(first, corrupt_labels(labels, 0.4, 10, seed=3))
    assert not np.array_equal(first, corrupt_labels(labels, 0.4, 10, seed=4))


def test_label_noise_is_symmetric():
    labels = np.full(90_000, 4)
    corrupted = corrupt_labels(labels, 0.5, num_classes=10, seed=0)
    counts = np.bincount(corrupted, minlength=10)
    assert counts[4] == 45_000
    # 5000 expected each; 5 standard deviations of a binomial are 333.
    assert np.abs(np.delete(counts, 4) - 5000).max() < 333


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan"), 40])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"--label_noise: expected a share .* in \[0, 1\), got"):
        corrupt_labels(np.zeros(4, dtype=int), share, num_classes=10, seed=0)


def test_a_label_out_of_range_is_refused():
    with pytest.raises(ValueError, match="Expected labels from 0 to 9, got 3 to 10"):
        corrupt_labels(np.array([3, 10]), 0.4, num_classes=10, seed=0)


# The run


class Recorder:
    """Stands for a trainer and notes what it is asked for."""

    train_dataset, eval_dataset = range(7), {"a": range(3), "b": iter(())}
    model = SimpleNamespace(config=SimpleNamespace(model_type="bert", _name_or_path=""))
    state = SimpleNamespace(log_history=[])

    def __init__(self, folder, **settings):
        off = {"method": "sam", "overwrite_output_dir": False, "early_stopping_patience": None, "ema_decay": None}
        off["metric_for_best_model"] = None
        off["main_process_first"] = lambda **named: nullcontext()
        self.args = SimpleNamespace(resume_from_checkpoint="a/b", output_dir=str(folder), **off, **settings)
        self.calls = []

    def is_world_process_zero(self):
        return True

    def add_callback(self, callback):
        """One that times steps, of which there are none."""

    def predict(self, dataset, metric_key_prefix):
        self.calls.append(("predict", dataset))
        return PredictionOutput(None, None, {f"{metric_key_prefix}_accuracy": 0.5})

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, *args, *kwargs.items()))
            return {"eval_accuracy": 1.0} if name == "evaluate" else SimpleNamespace(metrics={"train_loss": 0.5})

        return call


def test_the_time_of_a_step_is_the_median_from_end_to_end(monkeypatch):
    """Of a first step, an evaluation or a save it says nothing."""
    times = StepTimes()
    assert times.metrics() == {}
    for now in (9.0, 10.0, 11.0, 12.5, 99.0, 100.0):
        monkeypatch.setattr("time.perf_counter", lambda now=now: now)
        times.on_step_end()
    assert times.metrics() == {"train_seconds_per_step": 1.0}
    times.on_train_begin()
    assert times.metrics() == {}


def kept(split, metrics):
    return [(f"{verb}_metrics", split, metrics) for verb in ("log", "save")]


TRAIN = [
    ("train", ("resume_from_checkpoint", "a/b")),
    ("save_model",),
    ("save_state",),
    *kept("train", {"train_loss": 0.5, "train_samples": 7}),
]
SCORED = {"eval_accuracy": 1.0, "eval_a_samples": 3}
SCORE = [("evaluate",), *kept("eval", SCORED)]
CARD = ("create_model_card",)


@pytest.mark.parametrize(
    ("do_train", "do_eval", "push_to_hub", "calls"),
    [
        (True, True, False, [*TRAIN, *SCORE, CARD]),
        (True, False, True, [*TRAIN, ("push_to_hub",)]),
        (False, True, False, SCORE),
        (False, True, True, [*SCORE, ("push_to_hub",)]),
    ],
)
def test_a_run_does_what_the_arguments_ask_for(do_train, do_eval, push_to_hub, calls, tmp_path):
    trainer = Recorder(tmp_path, do_train=do_train, do_eval=do_eval, push_to_hub=push_to_hub, do_predict=False)
    assert train_and_score(trainer, scores=(), dataset="GLUE rte") == (SCORED if do_eval else {})
    assert trainer.calls == calls
    assert trainer.card_facts.dataset == "GLUE rte"


def test_of_several_data_sets_the_score_of_one_is_the_best(tmp_path):
    trainer = Recorder(tmp_path, do_train=True, do_eval=True, push_to_hub=False, do_predict=False)
    trainer.args.metric_for_best_model = "eval_b_accuracy"
    train_and_score(trainer, scores=["accuracy"])
    trainer.args.metric_for_best_model = "loss"
    with pytest.raises(
        ValueError, match="finds, a_loss, a_accuracy, b_loss, b_accuracy, got loss. Give one of these."
    ):
        train_and_score(trainer, scores=["accuracy"])


def test_predictions_are_written_for_each_data_set(tmp_path):
    trainer = Recorder(tmp_path, do_train=False, do_eval=False, push_to_hub=False, do_predict=True)
    written = []

    def write(output, folder, *name):
        written.append((output.metrics, folder, *name))

    one = {"test_accuracy": 0.5, "test_samples": 2}
    assert train_and_score(trainer, scores=(), test_dataset=[1, 2], write_predictions=write) == one
    assert trainer.calls == [("predict", [1, 2]), *kept("test", one)]
    assert written == [({"test_accuracy": 0.5}, tmp_path)]
    del trainer.calls[:], written[:]
    two = {f"test_{name}_{what}": value for name in "ab" for what, value in (("accuracy", 0.5), ("samples", 1))}
    assert train_and_score(trainer, scores=(), test_dataset={"a": [1], "b": [2]}, write_predictions=write) == two
    assert trainer.calls == [("predict", [1]), ("predict", [2]), *kept("test", two)]
    assert written == [({f"test_{name}_accuracy": 0.5}, tmp_path, name) for name in "ab"]
