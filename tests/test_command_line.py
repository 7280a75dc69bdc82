"""A script's command line: a file of arguments, the help in groups, one default per option, what is done at all."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_sampa.cards import started
from hf_sampa.finetuning import FineTuningArguments, FineTuningParser, ModelArguments, parse_arguments
from hf_sampa.training_args import SAMPaArgumentsMixin


@dataclass
class OwnArguments:
    """What a script adds."""

    _argument_group_name = "data"

    task: str = field(metadata={"help": "The task.", "choices": ["a", "b"]})
    columns: list[str] | None = field(default=None, metadata={"help": "The columns."})
    shuffle: bool = field(default=True, metadata={"help": "Whether to shuffle."})


def parser():
    made = FineTuningParser((OwnArguments, ModelArguments, FineTuningArguments), prog="script", usage="script ...")
    made.set_defaults(lmbda=0.1)
    return made


def defaults(given):
    return {"rho": 0.4, "num_train_epochs": 7} if given.task == "b" else {}


def parse(*words):
    return parse_arguments(parser(), [*words], defaults)


@pytest.fixture
def command(tmp_path):
    return ["--task", "a", "--model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), "--use_cpu"]


def file_of(tmp_path, content):
    file = tmp_path / "args.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


# A file


def test_a_file_of_arguments_is_read_and_flags_win(tmp_path):
    given = {"task": "b", "model_name_or_path": "m", "output_dir": str(tmp_path / "out"), "use_cpu": True}
    given |= {"columns": ["x", "y"], "learning_rate": 1e-4, "shuffle": False, "cache_dir": None}
    given |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "run_name": "-x", "seed": 3}
    own, model, args = parse(file_of(tmp_path, given))
    assert (own.task, own.columns, own.shuffle, model.cache_dir) == ("b", ["x", "y"], False, None)
    assert (args.learning_rate, args.lr_scheduler_kwargs, args.run_name) == (1e-4, {"num_cycles": 2}, "-x")
    assert (args.rho, args.num_train_epochs, args.seed) == (0.4, 7, 3)
    own, _, args = parse(file_of(tmp_path, given), "--seed", "5", "--columns", "z")
    assert (own.columns, args.seed) == (["z"], 5)
    assert parse(file_of(tmp_path, given), "--task", "a")[-1].rho == 0.05


def test_cards_name_the_options_of_a_file_instead_of_it(tmp_path, monkeypatch):
    given = {"task": "a", "model_name_or_path": "m", "output_dir": "out", "use_cpu": True, "run_name": "my run"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", file_of(tmp_path, given), "--seed", "5"])
    monkeypatch.setattr(started, "_script", lambda: ["train.py"])
    monkeypatch.setattr(started, "_given", [])
    parse_arguments(parser(), None, defaults)
    command = started.command(FineTuningArguments, 1)
    expected = (
        "train.py --task=a --model_name_or_path=m --output_dir=out-again --use_cpu=true '--run_name=my run' --seed 5"
    )
    assert f"python {expected}\n" in command


@pytest.mark.parametrize("words", [["--learning_rat", "1e-3"], ["--learning_rat=1e-3"]])
def test_an_option_that_is_not_spelled_out_is_refused(words, command, capsys):
    with pytest.raises(SystemExit):
        parse(*command, *words)
    assert f"unrecognized arguments: {' '.join(words)} (is it --learning_rate?)\n" in capsys.readouterr().err
    assert parse(*command, "--learning-rate", "1e-3")[-1].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rte": 1, "x": 2}, "expected names of options, got learning_rte, x (is it learning_rate?)"),
        ({"help": True}, "expected names of options, got help"),
        ('{"seed": 1, "seed": 2}', 'expected a JSON file of arguments, {"output_dir": ...}, got seed twice'),
        ("{", 'expected a JSON file of arguments, {"output_dir": ...}, got Expecting property name'),
        ([1], 'expected an object, {"output_dir": ...}, got a JSON list'),
        ({"seed": "x"}, "argument --seed: invalid int value: 'x'"),
        ({"columns": []}, "argument --columns: expected at least one argument"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_name(content, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(file_of(tmp_path, content))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "script: error: " in said and message in said
    assert message.startswith("argument") or f"{tmp_path / 'args.json'}: " in said


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(str(tmp_path / "no.json"))
    assert (
        'no.json: expected a JSON file of arguments, {"output_dir": ...}, got [Errno 2] No such file'
        in capsys.readouterr().err
    )


def test_a_word_that_is_no_option_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        parse(*command, "--no_such", "1")
    assert "script: error: unrecognized arguments: --no_such 1" in capsys.readouterr().err


# The help


def help_of(capsys, monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        parse(*words, "--help")
    assert caught.value.code == 0
    return capsys.readouterr().out


def default_of(name, text):
    """The last default that the help has of an option."""
    block = re.search(rf"^  --{name} .*?(?=^  --|^$)", text, flags=re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"\(default: (.*?)\)", " ".join(block.split()))[-1]


def test_the_help_is_in_groups_with_sampas_own_first(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch)
    titles = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert titles == [
        "options",
        "SAMPa: what a step is",
        "data",
        "model",
        "the run: what is done, and with how many examples per update",
        "training, as in transformers.TrainingArguments",
    ]
    groups = dict(zip(titles, re.split(r"^\w.*:$", text, flags=re.MULTILINE)[1:], strict=True))
    options = {title: re.findall(r"^  --(\w+)", group, flags=re.MULTILINE) for title, group in groups.items()}
    upstreams = set(TrainingArguments.__dataclass_fields__)
    assert set(options[titles[1]]) - {"no_overlap_exchange"} == {
        each.name for each in dataclasses.fields(SAMPaArgumentsMixin)
    }
    assert {"batch_size", "do_predict", "output_dir", "early_stopping_patience"} <= set(options[titles[4]])
    assert {name.removeprefix("no_") for name in options[titles[5]]} <= upstreams | {"no_cuda"}


def test_every_option_is_shown_once_with_one_default(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch)
    options = [each.split("\n\n")[0] for each in re.split(r"\n  (?=--)", text)[1:]]
    names = [each.split()[0] for each in options]
    assert len(names) == len(set(names)) > 100 and not any("-" in name[2:] for name in names)
    ours = options[: names.index("--per_device_train_batch_size")]
    for option in ours:
        assert option.count("default: ") <= 1 and "Default" not in option, option
    assert default_of("lmbda", text) == "0.1"
    assert re.search(r"--no_do_train +The same as --do_train false\.$", text, flags=re.MULTILINE)
    assert default_of("eval_strategy", text) == "epoch"


def test_defaults_that_are_shown_are_those_of_what_is_on_the_command_line(capsys, monkeypatch):
    assert default_of("rho", help_of(capsys, monkeypatch)) == "0.05"
    text = help_of(capsys, monkeypatch, "--task", "b")
    assert (default_of("rho", text), default_of("num_train_epochs", text)) == ("0.4", "7")
    assert default_of("rho", help_of(capsys, monkeypatch, "--task", "b", "--variant", "asam")) == "4.0"


# What is done


def test_what_is_off_is_off(command):
    args = parse(*command, "--do_eval", "false")[-1]
    assert (args.do_train, args.do_eval, args.do_predict) == (True, False, False)
    assert args.eval_strategy == IntervalStrategy.NO and args.save_strategy == "epoch"
    args = parse(*command, "--no_do_train", "--load_best_model_at_end")[-1]
    assert (args.do_train, args.do_eval, args.eval_strategy) == (False, True, IntervalStrategy.NO)
    args = parse(*command, "--do_train", "false", "--do_eval", "false", "--do_predict")[-1]
    assert (args.do_train, args.do_eval, args.do_predict) == (False, False, True)
    args = parse(*command)[-1]
    assert (args.do_eval, args.eval_strategy) == (True, IntervalStrategy.EPOCH)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--eval_strategy", "steps"], "--eval_strategy steps"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience 2"),
        (["--load_best_model_at_end"], "--load_best_model_at_end True"),
        (["--eval_on_start"], "--eval_on_start True"),
        (["--save_strategy", "best"], "--save_strategy best"),
    ],
)
def test_evaluations_during_training_go_with_do_eval(words, given, command):
    with pytest.raises(ValueError) as caught:
        parse(*command, "--do_eval", "false", *words)
    assert str(caught.value) == (
        f"{given}: expected --do_eval true, since it is about evaluations during training, got --do_eval false. Leave out one of "
        "them."
    )


def test_nothing_to_do_is_refused(command):
    with pytest.raises(ValueError, match="expected at least one to be true, got none. Turn one on."):
        parse(*command, "--do_train", "false", "--do_eval", "false")


def test_early_stopping_holds_the_best_weights(command):
    args = parse(*command, "--early_stopping_patience", "3")[-1]
    assert args.load_best_model_at_end and args.restore_callback_states_from_checkpoint
    assert args.metric_for_best_model == "loss"
    own = parse_arguments(
        parser(), [*command, "--early_stopping_patience", "3"], lambda given: {"metric_for_best_model": "f1"}
    )
    assert own[-1].metric_for_best_model == "f1" and own[-1].greater_is_better
    for words, message in (
        (["0"], "expected at least 1 evaluation, and a threshold of at least 0, got 0 and 0.0"),
        (["1", "--early_stopping_threshold", "nan"], "got 1 and nan. Leave it out for no early stopping."),
        (
            ["1", "--eval_strategy", "no"],
            "got --eval_strategy no. Set --eval_strategy and --save_strategy to epoch, or both",
        ),
        (["1", "--eval_strategy", "steps"], "requires the save and eval strategy to match"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse(*command, "--early_stopping_patience", *words)
