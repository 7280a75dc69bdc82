"""What a card says, from log lines and settings."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments, compat
from hf_sampa.cards import evaluations, model_card, started
from hf_sampa.cards.evaluations import Evaluation
from hf_sampa.cards.signature import why_left_alone
from hf_sampa.variants.directions import Smoothed
from hf_sampa.variants.recipe import Recipe
from tests import models, tiny


TOKEN = "hf_" + "a1" * 17  # as long as the Hub's are
RUN = {"name": "Reviews", "type": "user/reviews", "config": None, "split": "validation"}


def evaluated(step, accuracy, prefix="eval"):
    found = {"loss": 1 / step, "accuracy": accuracy, "runtime": 2.0, "samples_per_second": 9.0}
    return {**{f"{prefix}_{name}": value for name, value in found.items()}, "step": step, "epoch": step / 4}


def logged(step):
    return {"loss": 1.0 / step, "perturbed_loss": 2.0 / step, "sharpness": 1.0 / step, "step": step, "epoch": step / 4}


END = {"train_runtime": 10.0, "train_loss": 0.5, "step": 8, "epoch": 2.0}


def trainer_of(history, weights_step, eval_dataset=None):
    state = SimpleNamespace(log_history=history)
    return SimpleNamespace(state=state, weights_step=weights_step, eval_dataset=eval_dataset)


def results_of(trainer, recorded=()):
    found = evaluations.results(evaluations.evaluations(trainer, recorded), trainer.weights_step, "task", RUN)
    return [(each.entry.dataset_split, each.entry.metric_type, each.entry.metric_value, each.step) for each in found]


def test_the_results_are_the_last_ones_of_the_weights_or_of_weights_before_them():
    history = [logged(4), evaluated(4, 0.9), logged(8), evaluated(8, 0.8), END]
    assert results_of(trainer_of(history, 8)) == [("validation", "loss", 1 / 8, 8), ("validation", "accuracy", 0.8, 8)]
    best = trainer_of([*history, evaluated(8, 0.95)], 4)
    assert results_of(best, [Evaluation(best.state.log_history[-1], 4)])[1] == ("validation", "accuracy", 0.95, 4)
    assert results_of(trainer_of(history, 4))[1] == ("validation", "accuracy", 0.9, 4)
    assert results_of(trainer_of(history, 9))[1] == ("validation", "accuracy", 0.8, 8)
    assert results_of(trainer_of([logged(4), END], 8)) == []


def test_several_evaluation_datasets_are_told_apart_though_one_name_begins_like_another():
    history = [evaluated(4, 0.5, "eval_a"), evaluated(4, 0.6, "eval_a_b")]
    assert [
        each for each in results_of(trainer_of(history, 4, {"a": [1], "a_b": [1, 2]})) if each[1] == "accuracy"
    ] == [
        ("validation_a", "accuracy", 0.5, 4),
        ("validation_a_b", "accuracy", 0.6, 4),
    ]


def test_a_metric_of_any_kind_is_in_the_results():
    values = {"f1": float("nan"), "by_class": np.array([0.5, float("inf")]), "counts": {"a": 1}, "note": "a|b\nc"}
    history = [{**{f"eval_{name}": value for name, value in values.items()}, "eval_runtime": 1.0, "step": 4}]
    found = evaluations.results(evaluations.evaluations(trainer_of(history, 4), []), 4, "task", RUN)
    plain = {each.entry.metric_type: each.entry.metric_value for each in found}
    assert plain == {"f1": "nan", "by_class": [0.5, "inf"], "counts": {"a": 1}, "note": "a|b\nc"}
    assert [each.cells()[-1] for each in found] == ["nan", "[0.5, inf]", "{'a': 1}", "a\\|b c"]


def test_the_curve_has_a_line_for_each_evaluated_step_or_for_each_log_line():
    def curve(history, recorded=()):
        found = evaluations.evaluations(trainer_of(history, 8), recorded)
        return evaluations.curve(history, found).splitlines()

    history = [logged(2), logged(4), evaluated(4, 0.9), evaluated(6, 0.7), logged(8), evaluated(8, 0.8), END]
    lines = curve(history)
    assert lines[0] == "| step | epoch | loss | perturbed loss | sharpness | eval loss | eval accuracy |"
    expected = [
        "| 4 | 1 | 0.25 | 0.5 | 0.25 | 0.25 | 0.9 |",
        "| 6 | 1.5 |  |  |  | 0.1667 | 0.7 |",
        "| 8 | 2 | 0.125 | 0.25 | 0.125 | 0.125 | 0.8 |",
    ]
    assert lines[2:] == expected
    test, best = evaluated(8, 0.1, "test"), evaluated(8, 0.95)
    afterwards = [Evaluation(test, 4, "test", None, {"split": "test"}), Evaluation(best, 4)]
    expected[0] = "| 4 | 1 | 0.25 | 0.5 | 0.25 | 0.125 | 0.95 |"
    assert curve([*history, test, best], afterwards)[2:] == expected
    assert len(curve([logged(2), logged(4), END])) == 4
    assert curve([END]) == []
    long = curve([logged(step) for step in range(1, 92)])
    assert long[2].startswith("| 3 |") and long[-3].startswith("| 91 |") and len(long) == 2 + 23 + 2
    assert long[-1] == "Of the logged lines, one in 4 is shown."


def is_somebodys(card):
    return why_left_alone(card) is not None


def card_of(trainer):
    trainer.create_model_card()
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def results(card):
    return {
        (each.dataset_name, each.dataset_split, each.metric_type): each.metric_value for each in card.data.eval_results
    }


class Part(list):
    """Samples with what `datasets.Dataset` says of itself."""

    def __init__(self, rows, builder_name, config_name, split):
        super().__init__(rows)
        self.builder_name, self.config_name, self.split = builder_name, config_name, split


def test_evaluations_are_credited_to_their_own_data(tmp_path):
    trainer = trained(tmp_path, eval_dataset={"a": tiny.sentences(4, seed=2), "b": tiny.sentences(6, seed=3)})
    trainer.card_facts.dataset, trainer.card_facts.dataset_split = "Reviews", "validation"
    found = {}
    for arguments, where in (
        ((), ("Reviews", "validation_a")),
        ((trainer.eval_dataset["b"],), ("Reviews", "validation_b")),
        ((tiny.sentences(5, seed=4), None, "test"), ("Reviews", "test")),
        ((tiny.sentences(5, seed=5),), ("another data set of 5 samples", None)),
        ((tiny.sentences(5, seed=6), None, "hard_ones"), ("hard_ones", None)),
        ((Part(tiny.sentences(5, seed=7), "imdb", "plain", "unsupervised"),), ("imdb", "unsupervised")),
    ):
        metrics = trainer.evaluate(*arguments)
        prefix = "eval_a" if not arguments else arguments[2] if len(arguments) == 3 else "eval"
        found[(*where, "loss")] = metrics[f"{prefix}_loss"]
        if not arguments:
            first_of_b = metrics["eval_b_loss"]
    assert found[("Reviews", "validation_b", "loss")] == first_of_b
    card = card_of(trainer)
    assert results(card) == found
    assert (
        "| Reviews | validation_b | 6 | 2 | loss |" in card.text and "| hard_ones | evaluation | 5 | 2 |" in card.text
    )
    imdb = next(each for each in card.data.eval_results if each.dataset_name == "imdb")
    assert (imdb.dataset_type, imdb.dataset_config) == ("imdb", "plain")
    trainer.train()
    assert results(card_of(trainer)) == {}, "these weights were not evaluated"


@pytest.mark.parametrize(("accuracies", "step"), [([0.5, 0.9, 0.7, 0.4], 2), ([0.5, 0.6, 0.7, 0.9], 4)])
def test_of_the_best_weights_the_card_says_all_that_it_says(tmp_path, accuracies, step):
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    accuracies = cycle(accuracies)
    trainer = trained(
        tmp_path,
        eval_dataset=tiny.sentences(4, seed=2),
        compute_metrics=lambda prediction: {"accuracy": next(accuracies)},
        **best,
        **{"max_steps": 4, "logging_steps": 1, "diagnostics_steps": 2, "learning_rate": 1e-2},
    )
    history = trainer.state.log_history
    assert trainer.weights_step == trainer.state.best_global_step == step
    metrics = trainer.evaluate()
    card = card_of(trainer)
    assert results(card)[("unknown", None, "loss")] == metrics["eval_loss"]
    assert (f"- weights: those of step {step}, the best by accuracy\n" in card.text) == (step < 4)
    sharpness = next(line["sharpness"] for line in history if line["step"] == step and "sharpness" in line)
    assert f"mean over the last steps up to {step}: {sharpness:.4g}" in card.text
    measured = [line for line in history if "held_out_sharpness" in line]
    assert [line.get("weights_step") for line in measured] == [None, None, step if step < 4 else None]
    sharpness = f"sharpness (radius 0.05, 1 batch) {measured[-1]['held_out_sharpness']:.4g}"
    assert f"at the weights of step {step}: {sharpness}" in card.text
    assert "weights of step 2: sharpness" in (tmp_path / "checkpoint-3" / "README.md").read_text()


def test_a_run_too_short_for_a_log_line_has_a_sharpness(tmp_path):
    trainer = trained(tmp_path, logging_steps=100)
    assert f"steps up to 2: {trainer.unlogged_means()['sharpness']:.4g}" in card_of(trainer).text


def test_on_a_cpu_the_card_names_the_threads_that_its_bits_depend_on(tmp_path):
    assert f"\n- threads_per_process: {torch.get_num_threads()}\n" in card_of(trained(tmp_path)).text


def started_as(monkeypatch, argv, module=None):
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("world_size", "words", "expected"),
    [
        (1, ["--rho", "0.1"], "python glue/run.py --rho 0.1"),
        (
            2,
            ["--output_dir", "my model"],
            "torchrun --standalone --nproc_per_node 2 glue/run.py --output_dir 'my model'",
        ),
        (1, ["--hub_token", "secret", "--x"], "python glue/run.py --hub_token HIDDEN --x"),
        (1, ["--push-to-hub-token=secret"], "python glue/run.py --push-to-hub-token=HIDDEN"),
        (1, ["--hub_token=a=b"], "python glue/run.py --hub_token=HIDDEN"),
        (1, ["--hub_token", "ab=cd"], "python glue/run.py --hub_token HIDDEN"),
        (1, ["--wandb_key=abc", "--token", "abc"], "python glue/run.py --wandb_key=HIDDEN --token HIDDEN"),
        (1, ["--tokenizer", "x", "--max_tokens=3"], "python glue/run.py --tokenizer HIDDEN --max_tokens=HIDDEN"),
        (1, ["--word", TOKEN, "--x", "1"], "python glue/run.py --word HIDDEN --x HIDDEN"),
        (1, [TOKEN], "python glue/run.py HIDDEN"),
        (1, [f"--word={TOKEN}"], "python glue/run.py --word=HIDDEN"),
        (1, ["--key", "abc", "--passwd", "-x"], "python glue/run.py --key HIDDEN --passwd HIDDEN"),
        (1, ["--wandb_apikey", "S", "--hub.token=S"], "python glue/run.py --wandb_apikey HIDDEN --hub.token=HIDDEN"),
        (1, ["--api_tokens", "S", "--pwd=S"], "python glue/run.py --api_tokens HIDDEN --pwd=HIDDEN"),
        (1, ["--auth", "S", "https://u:S@h/x"], "python glue/run.py --auth HIDDEN HIDDEN"),
        (1, ["--pad_token", "x", "--text_key=a"], "python glue/run.py --pad_token HIDDEN --text_key=HIDDEN"),
        (1, ["--data_dir", "hf_data", "--author", "me"], "python glue/run.py --data_dir hf_data --author HIDDEN"),
        (
            1,
            ["--train_file", "reviews.csv", "--text_column_names", "title", "--delimiter=;", "--metric_name", "f1"],
            "python glue/run.py --train_file reviews.csv --text_column_names title '--delimiter=;' --metric_name f1",
        ),
        (1, ["--train_file", f"{TOKEN}.csv"], "python glue/run.py --train_file HIDDEN"),
        (1, ["--train_file=my data/R&D it's.csv"], """python glue/run.py '--train_file=my data/R&D it'"'"'s.csv'"""),
        (1, ["--train_file", f"it's{TOKEN}.csv"], "python glue/run.py --train_file HIDDEN"),
        (1, ["--train_file", "'password'"], "python glue/run.py --train_file HIDDEN"),
        (1, ["--resume_from_checkpoint", "out/checkpoint-2", "--seed", "1"], "python glue/run.py --seed 1"),
        (1, ["--seed", "1", "--resume-from-checkpoint=true"], "python glue/run.py --seed 1"),
        (1, ["--resume_from_checkpoint", "--seed", "1"], "python glue/run.py --seed 1"),
    ],
)
def test_the_command_is_the_one_that_started_the_run_without_secrets(world_size, words, expected, monkeypatch):
    started_as(monkeypatch, ["glue/run.py", *words])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world_size))
    assert started.command(SAMPaTrainingArguments, world_size) == f"```bash\n{expected}\n```"


@pytest.mark.parametrize(("folder", "hidden"), [("data", False), ("/home/me/data", True)])
def test_the_card_says_that_what_is_hidden_is_to_be_filled_in(folder, hidden, tmp_path, monkeypatch):
    started_as(monkeypatch, ["train.py", "--output_dir", folder])
    text = card_of(trained(tmp_path)).text
    said = "\n```\n\nFill in what is `HIDDEN` here: what may be a secret, or a folder that names a person, is not shown.\n\n###"
    assert (said in text) == hidden and ("HIDDEN" in text) == hidden
    assert "\n```\n\n###" in text or hidden


def test_several_nodes_and_threads_are_in_the_command(monkeypatch):
    started_as(monkeypatch, ["train.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "OMP_NUM_THREADS=1 torchrun --nnodes 3 --nproc_per_node 2 train.py" in started.command(
        SAMPaTrainingArguments, 6
    )


def test_a_module_is_started_as_one(monkeypatch):
    started_as(monkeypatch, ["/home/me/project/train.py", "--rho", "0.1"], module="project.train")
    assert "\npython -m project.train --rho 0.1\n" in started.command(SAMPaTrainingArguments, 1)
    started_as(monkeypatch, ["/home/me/project/__main__.py"], module="project.__main__")
    assert "\ntorchrun --standalone --nproc_per_node 2 -m project\n" in started.command(SAMPaTrainingArguments, 2)


@pytest.mark.parametrize("module", [None, "ipykernel_launcher"])
@pytest.mark.parametrize("script", ["-c", "/usr/lib/python3/ipykernel_launcher.py"])
def test_no_command_where_there_is_no_script(script, module, monkeypatch):
    started_as(monkeypatch, [script], module)
    assert started.command(SAMPaTrainingArguments, 1).startswith("Not from a script")


def trained(folder, model=tiny.bert, resume=None, **changes):
    others = ("recipe", "eval_dataset", "compute_metrics", "optimizers")
    others = {name: changes.pop(name) for name in others if name in changes}
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **changes}
    args = tiny.arguments(folder, **settings)
    trainer = SAMPaTrainer(model=model(), args=args, train_dataset=tiny.sentences(16), **others)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_card_is_written_with_every_checkpoint(tmp_path):
    trained(tmp_path, rho=0.07, variant="gsam", variant_args={"alpha": 0.3}, label_smoothing_factor=0.1)
    for step in (1, 2):
        card = ModelCard.load(tmp_path / f"checkpoint-{step}" / "README.md")
        assert f"- steps: {step}," in card.text
        for line in (
            "rho: 0.07",
            "lmbda: 0.2",
            "variant: gsam",
            "label_smoothing_factor: 0.1",
            "processes: 1, in both roles",
        ):
            assert f"- {line}" in card.text
        assert "- variant_args: alpha = 0.3" in card.text and "arxiv.org/abs/2203.08065" in card.text
        assert {"sampa", "arxiv:2410.10683", "arxiv:2203.08065"} <= set(card.data.tags)
        assert "None" not in card.text and "output_dir" not in card.text and str(tmp_path) not in card.text
    assert not (tmp_path / "README.md").exists()


def test_a_recipe_of_ones_own_is_in_the_card(tmp_path):
    trained(tmp_path, recipe=Recipe(direction=Smoothed(0.3)))
    card = (tmp_path / "checkpoint-1" / "README.md").read_text()
    assert "- recipe: direction Smoothed(theta=0.3)\n" in card and "- variant" not in card


def test_a_card_that_somebody_wrote_or_changed_is_left_alone(tmp_path, caplog):
    trainer = trained(tmp_path)
    card = tmp_path / "README.md"
    trainer.create_model_card()
    assert not is_somebodys(card)
    trainer.create_model_card(dataset="sentences", tags="mine")
    assert "on sentences." in card.read_text() and "mine" in ModelCard.load(card).data.tags
    for text in (card.read_text().replace("sentences", "my sentences"), "# Mine\n"):
        card.write_text(text)
        assert is_somebodys(card)
        with tiny.transformers_log(caplog):
            trainer.create_model_card()
        assert card.read_text() == text
        assert "README.md is left as it is, since somebody wrote or changed it" in caplog.text
        caplog.clear()


def test_a_checkpoint_whose_card_was_changed_is_whole_and_its_card_is_kept(tmp_path):
    trained(tmp_path)
    card = tmp_path / "checkpoint-1" / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    shutil.rmtree(tmp_path / "checkpoint-2")
    trained(tmp_path, resume=True)
    assert card.read_text().endswith("Mine.\n")
    assert not is_somebodys(tmp_path / "checkpoint-2" / "README.md")


def test_a_model_without_a_configuration_has_a_card_too(tmp_path):
    trainer = SAMPaTrainer(
        model=tiny.BatchNormNet(),
        args=tiny.arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=tiny.images(8),
    )
    trainer.train()
    trainer.create_model_card()
    for file in (tmp_path / "README.md", tmp_path / "checkpoint-1" / "README.md"):
        assert "- steps: 1," in file.read_text() and "from_pretrained" not in file.read_text()


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_form_that_peft_leaves_is_no_card_of_somebodys(tmp_path, caplog):
    trainer = trained(tmp_path, model=models.lora_bert)
    trainer.save_model()
    assert "# Model Card for Model ID" in (tmp_path / "README.md").read_text()
    for _ in range(2):
        trainer.create_model_card()
        trainer.save_model()
        for file in (tmp_path / "README.md", tmp_path / "checkpoint-2" / "README.md"):
            card = ModelCard.load(file)
            assert not is_somebodys(file) and "More Information Needed" not in card.text
            assert card.data.library_name == "peft" and "sampa" in card.data.tags
            assert "from peft import AutoPeftModel" in card.text


def test_what_is_told_after_a_checkpoint_reaches_the_metadata_of_the_next(tmp_path):
    class Tells(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.card_facts.license, trainer.card_facts.dataset_tags = "mit", "user/reviews"

    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=tiny.sentences(8),
        callbacks=[Tells()],
    )
    trainer.card_facts.tags = ["mine", "sam"]
    trainer.train()
    before, after = (ModelCard.load(tmp_path / f"checkpoint-{step}" / "README.md").data for step in (1, 2))
    assert (before.license, before.datasets) == (None, None)
    assert (after.license, after.datasets) == ("mit", ["user/reviews"])
    for data in (before, after, card_of(trainer).data):
        assert "mine" in data.tags and "sam" not in data.tags


def test_a_fact_that_there_is_not_is_refused(tmp_path):
    trainer = trained(tmp_path)
    with pytest.raises(AttributeError, match="datset"):
        trainer.card_facts.datset = "Reviews"
    with pytest.raises(TypeError, match="datset"):
        trainer.create_model_card(datset="Reviews")


def origin(card):
    return card.data.base_model, card.text.partition("# out\n\n")[2].partition(" It was trained with")[0]


def test_a_base_model_in_a_folder_is_no_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_cache = tmp_path / "models--user--small-bert" / "snapshots" / "0a1b"
    for place in (tmp_path / "my-bert", in_cache):
        tiny.bert().save_pretrained(place)
    data = "a data set that the run did not name"
    began = f"This model was trained on {data}, starting from the model in the local folder `{{}}`."
    linked = "This model is a fine-tuned version of [{0}](https://huggingface.co/{0}) on " + f"{data}."
    for number, (folder, told, expected) in enumerate(
        [
            ("my-bert", None, (None, began.format("my-bert"))),
            ("./my-bert", None, (None, began.format("my-bert"))),
            (str(tmp_path / "my-bert"), None, (None, began.format("my-bert"))),
            (str(in_cache), None, ("user/small-bert", linked.format("user/small-bert"))),
            ("my-bert", "user/told", ("user/told", linked.format("user/told"))),
            ("my-bert", "./told", (None, began.format("told"))),
        ]
    ):
        model = partial(AutoModelForSequenceClassification.from_pretrained, folder)
        trainer = trained(tmp_path / str(number) / "out", model=model, max_steps=1)
        trainer.card_facts.finetuned_from = told
        assert origin(card_of(trainer)) == expected
    config = AutoConfig.from_pretrained("my-bert")
    config._name_or_path = "user/small-bert"
    trainer = trained(
        tmp_path / "out", model=lambda: AutoModelForSequenceClassification.from_config(config), max_steps=1
    )
    assert origin(card_of(trainer)) == (None, f"This model was trained on {data}."), "it has no weight of that model"


def lines(trainer):
    """Of the card's list of hyperparameters."""
    return dict(re.findall(r"^- ([\w ]+): (.*)$", card_of(trainer).text.partition("### Hyperparameters")[2], re.M))


@dataclass
class WithSecrets(SAMPaTrainingArguments):
    wandb_api_key: str = ""
    db_password: str = ""
    note: str = ""
    place: str = ""
    text_key: str = ""


def test_arguments_that_are_secret_are_not_in_the_card(tmp_path):
    secrets = {"wandb_api_key": "SECRET1", "db_password": "SECRET2", "place": f"https://me:{TOKEN}@host"}
    args = WithSecrets(str(tmp_path), use_cpu=True, report_to=[], **secrets, note="two\nlines", text_key="review")
    found = lines(SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(8)))
    assert found["note"] == found["text_key"] == "HIDDEN"
    assert not {"SECRET1", "SECRET2", TOKEN} & set(re.findall(r"\w+", str(found)))


def test_an_optimizer_and_a_schedule_of_ones_own_are_what_the_card_says(tmp_path):
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    found = lines(trained(tmp_path, model=lambda: model, optimizers=(optimizer, schedule)))
    assert found["optimizer"] == "SGD, momentum 0.9" and found["learning_rate"] == "0.3"
    assert (found["weight_decay"], found["lr_scheduler_type"]) == ("0.1", "ConstantLR")
    found = lines(trained(tmp_path, weight_decay=0.01, optim="sgd", optim_args="momentum=0.5"))
    assert found["optimizer"] == "SGD, momentum 0.5" and not {"optim", "optim_args"} & found.keys()
    assert (found["learning_rate"], found["weight_decay"]) == ("0.001", "0.01 or 0.0")
    assert found["lr_scheduler_type"] == "linear"


def test_a_precision_that_only_the_launcher_knows_is_in_the_card_and_in_the_command(tmp_path, monkeypatch):
    started_as(monkeypatch, ["train.py"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "\npython train.py\n" in started.command(SAMPaTrainingArguments, 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = trained(tmp_path)
    assert lines(trainer)["mixed_precision"] == "bf16"
    assert "\nACCELERATE_MIXED_PRECISION=bf16 python train.py\n" in card_of(trainer).text


def test_shards_that_only_the_launcher_knows_are_in_the_command(monkeypatch):
    started_as(monkeypatch, ["train.py"])
    for name, value in (
        ("FSDP_VERSION", "2"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer,BertEmbeddings"),
        ("FSDP_RESHARD_AFTER_FORWARD", "true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false"),
    ):
        monkeypatch.setenv(name, value)
    assert "\ntorchrun --standalone --nproc_per_node 4 train.py\n" in started.command(SAMPaTrainingArguments, 4)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    variables = (
        "ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP "
        "FSDP_TRANSFORMER_CLS_TO_WRAP=BertLayer,BertEmbeddings"
    )
    assert f"\n{variables} torchrun --standalone" in started.command(SAMPaTrainingArguments, 4)


def test_a_run_that_was_continued_with_other_settings_says_so(tmp_path, monkeypatch):
    checkpoint = str(tmp_path / "checkpoint-1")
    started_as(monkeypatch, ["train.py", "--resume_from_checkpoint", "out/checkpoint-1"])
    trained(tmp_path, rho=0.05)
    same = trained(tmp_path / "same", rho=0.05, resume=checkpoint)
    assert same.continued == [] and "\npython train.py\n" in card_of(same).text
    other = trained(tmp_path / "other", rho=0.2, lmbda=0.1, resume=checkpoint)
    text = card_of(other).text
    assert "\n- continued after step 1 with other settings: rho 0.05, then 0.2; lmbda 0.2, then 0.1\n" in text
    assert "train.py --resume_from_checkpoint out/checkpoint-1\n" in text
    again = trained(
        tmp_path / "again", rho=0.2, lmbda=0.1, resume=str(tmp_path / "other" / "checkpoint-2"), max_steps=3
    )
    assert again.continued == [
        *other.continued,
        "continued after step 2 with other settings: training_steps 2, then 3",
    ]


def test_steps_of_plain_trainer_are_called_so(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, report_to=[], **settings)
    Trainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16)).train()
    trainer = trained(tmp_path / "on", resume=str(tmp_path / "checkpoint-1"))
    assert "\n- steps 1 to 1 were plain Trainer's\n" in card_of(trainer).text


def test_a_trainer_that_did_not_train_leaves_the_card_of_a_run(tmp_path, caplog):
    trainer = trained(tmp_path, rho=0.2)
    before = card_of(trainer).text
    trainer.create_model_card(license="mit")
    args = tiny.arguments(tmp_path)
    trainer.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    later = SAMPaTrainer(model=model, args=args, train_dataset=tiny.sentences(8))
    later.hub_model_id = "user/renamed"
    with tiny.transformers_log(caplog):
        later.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "- rho: 0.2\n" in card.text and card.data.license == "mit" and before != card.text
    assert "README.md is left as it is, since it is of the run that made this model" in caplog.text
    assert '\nname = "user/renamed"\n' in card.text and not is_somebodys(tmp_path / "README.md")
    other = SAMPaTrainer(model=tiny.bert(seed=1), args=args, train_dataset=tiny.sentences(8))
    assert "- steps: 0," in card_of(other).text, "the run's card is not this model's"


def test_a_fact_of_another_type_is_refused_and_a_card_that_fails_ends_no_training(tmp_path, caplog):
    trainer = trained(tmp_path / "facts")
    for name, value in {"tags": ("a", "b"), "dataset_args": 7, "license": ["mit"]}.items():
        with pytest.raises(TypeError, match=f"{name}: expected text.* for the model card, got "):
            setattr(trainer.card_facts, name, value)
    (tmp_path / "facts" / "README.md").write_bytes(b"\xff\xfe mine")
    trainer.create_model_card()
    assert (tmp_path / "facts" / "README.md").read_bytes() == b"\xff\xfe mine"
    trainer = trained(
        tmp_path / "none",
        eval_dataset=tiny.sentences(4),
        compute_metrics=lambda prediction: {"accuracy": 0.5, "auc": None},
        eval_strategy="steps",
        eval_steps=1,
    )
    assert results(card_of(trainer))[("unknown", None, "auc")] == "None"
    with patch.object(model_card, "write", side_effect=ValueError("no card today")), tiny.transformers_log(caplog):
        trained(tmp_path / "failing")
    assert "There is no new card in" in caplog.text and "ValueError: no card today" in caplog.text
    assert (tmp_path / "failing" / "checkpoint-2" / "sampa.json").exists()


def test_what_a_dataset_says_of_itself_is_taken_for_what_it_is(tmp_path):
    whole = Dataset.from_generator(lambda: iter(tiny.sentences(12)), cache_dir=str(tmp_path / "cache"), split="train")
    parts = whole.train_test_split(4)
    trainer = SAMPaTrainer(
        model=tiny.bert(), args=tiny.arguments(tmp_path), train_dataset=parts["train"], eval_dataset=parts["test"]
    )
    trainer.evaluate()
    card = card_of(trainer)
    assert card.data.datasets is None and results(card).keys() == {("unknown", None, "loss")}
    assert "on a data set that the run did not name." in card.text


def test_remarks_are_in_the_card(tmp_path):
    trainer = trained(tmp_path)
    trainer.card_facts.remarks = ["labels of 40 % of the training images are wrong"]
    trainer.card_facts.dataset = ["One", "Other"]
    card = card_of(trainer)
    assert (
        "\n- labels of 40 % of the training images are wrong\n- steps: 2," in card.text
        and "on One and Other." in card.text
    )


@pytest.mark.parametrize(
    ("variant", "method", "perturbs_uphill"),
    [("sampa_0", "sampa", True), ("optgd", "sampa", False), ("randsam", "sam", False)],
)
def test_a_variant_is_not_said_to_do_what_it_does_not(tmp_path, variant, method, perturbs_uphill):
    text = card_of(trained(tmp_path, variant=variant, method=method, lmbda=None)).text
    assert "lambda of the look-ahead gradient goes" not in text
    assert ("each update takes the gradient at weights perturbed uphill" in text) == perturbs_uphill
    assert "flat minima tend to generalize better" in text or "seeks flat minima" in text


def small(kind, config_class, **changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 8,
        "d_model": 8,
        "num_layers": 1,
        "num_heads": 1,
        "n_layer": 1,
        "n_head": 1,
    }
    return kind(config_class(**{**sizes, "n_embd": 8, "d_kv": 8, "d_ff": 8, **changes}))


def adapted_bert(folder):
    tiny.bert().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))


def bert_with_adapters_of_transformers(folder):
    tiny.bert().save_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    except ValueError as error:
        assert "use a version" in str(error)
        pytest.skip("transformers 5.24 asks for a peft that is newer than the newest")
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda _: tiny.bert(), "AutoModelForSequenceClassification"),
        (adapted_bert, "AutoPeftModelForSequenceClassification"),
        (bert_with_adapters_of_transformers, "AutoModelForSequenceClassification"),
        (lambda _: small(GPT2LMHeadModel, GPT2Config), "AutoModelForCausalLM"),
        (lambda _: small(T5ForConditionalGeneration, T5Config), "AutoModelForSeq2SeqLM"),
        (lambda _: small(T5EncoderModel, T5Config), "AutoModelForTextEncoding"),
    ],
)
@pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_lines_that_load_the_model_make_the_same_one(tmp_path, monkeypatch, make, expected):
    if make is bert_with_adapters_of_transformers and compat.before("transformers", "5.12"):
        pytest.skip("transformers 5.3 itself does not load the adapters that it saved")
    model = make(tmp_path)
    trainer = SAMPaTrainer(model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.sentences(8))
    trainer.save_model()
    block = card_of(trainer).text.partition("```python\n")[2].partition("```")[0]
    assert f" import {expected}\n" in block
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block, found)
    assert type(found["model"]) is type(model)
    assert tiny.differing(found["model"].state_dict(), model.state_dict()) == []


def test_evaluations_that_do_not_find_the_same_names_have_a_card(tmp_path):
    found = iter([{"accuracy": 0.5}, {"accuracy": 0.6, "f1": 0.7}, {"accuracy": 0.8}])
    trainer = trained(
        tmp_path,
        eval_dataset=tiny.sentences(4),
        compute_metrics=lambda prediction: next(found),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.evaluate()
    named = {name: value for (_, _, name), value in results(card_of(trainer)).items() if name != "loss"}
    assert named == {"accuracy": 0.8, "f1": 0.7}


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_nothing_of_an_older_card_is_in_a_new_one(tmp_path):
    adapters = trained(tmp_path, model=models.lora_bert, variant="asam")
    adapters.card_facts = {"tags": ["mine"]}
    assert card_of(adapters).data.library_name == "peft"
    trainer = trained(tmp_path, method="sam")
    trainer.card_facts.tags = "other"
    data = card_of(trainer).data
    assert {"other", "arxiv:2010.01412"} <= set(data.tags) and data.library_name == "transformers"
    assert not {"mine", "sampa", "arxiv:2102.11600", "lora"} & set(data.tags)


def test_evaluations_before_a_checkpoint_are_known_after_it(tmp_path):
    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.trainer.evaluate(tiny.sentences(5, seed=5))
                self.trainer.evaluate(tiny.sentences(6, seed=6), metric_key_prefix="test")
                self.trainer.evaluate()

    def run(folder, callbacks, resume=None):
        args = tiny.arguments(folder, max_steps=3, save_strategy="steps", save_steps=1)
        trainer = SAMPaTrainer(
            model=tiny.bert(),
            args=args,
            train_dataset=tiny.sentences(16),
            eval_dataset=tiny.sentences(4),
            callbacks=callbacks,
        )
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train(resume)
        return [line for line in card_of(trainer).text.splitlines() if re.match(r"\| .* \| \d+ \| 1 \| loss", line)]

    whole = run(tmp_path / "whole", [Evaluates()])
    assert len(whole) == 3 and run(tmp_path / "on", [], str(tmp_path / "whole" / "checkpoint-1")) == whole
    assert run(tmp_path / "again", [], str(tmp_path / "on" / "checkpoint-2")) == whole


def named(rows, name):
    """A data set as `load_dataset` gives it."""
    columns = [{key: np.asarray(value).tolist() for key, value in row.items()} for row in rows]
    found = Dataset.from_list(columns, split="test")
    found.info.builder_name, found.info.config_name = name, "plain"
    return found


def test_parts_of_the_data_and_other_data_do_not_take_the_place_of_results(tmp_path):
    imdb, yelp = (named(tiny.sentences(8, seed=seed), name) for seed, name in ((2, "imdb"), (3, "yelp")))
    trainer = trained(tmp_path, eval_dataset=imdb)
    trainer.evaluate()
    trainer.evaluate(imdb.select(range(2)))
    trainer.evaluate(yelp)
    assert {(name, split) for name, split, _ in results(card_of(trainer))} == {
        ("imdb", "test"),
        ("imdb", "test, 2 samples"),
        ("yelp", "test"),
    }
    trainer = trained(tmp_path / "several", eval_dataset={"a": imdb, "b": yelp})
    trainer.evaluate()
    assert {name for name, _, _ in results(card_of(trainer))} == {"imdb", "yelp"}
    trainer = trained(tmp_path / "train", eval_dataset=yelp)
    trainer.train_dataset = imdb
    assert " on imdb (plain)." in card_of(trainer).text and card_of(trainer).data.datasets == ["imdb", "yelp"]


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        (["--model_init_kwargs", f'{{"token": "{TOKEN}"}}'], True),
        (["--header", "Authorization: Bearer abc"], True),
        (["--env", f"HF_TOKEN={TOKEN}"], True),
        (["--set", "hub_token=abc"], True),
        (["--api_keys", "k1", "k2", "--seed", "1"], True),
        ([f"https://{TOKEN}@host"], True),
        (["https://host/?token=abc"], True),
        (["--hubToken", "x"], True),
        (["--run_name", "hf_sampa_rte_rho_0_05_seed_1"], False),
        (["--length_column_name", "length", "--max_steps", "5"], False),
        (["--use_auth_token", "--do_train"], False),
    ],
)
def test_secrets_of_every_form_are_hidden_and_nothing_else(words, hidden, monkeypatch):
    started_as(monkeypatch, ["train.py", *words])
    command = started.command(SAMPaTrainingArguments, 1)
    assert not hidden or not {TOKEN, "abc", "k1", "k2", "x"} & set(re.findall(r"\w+", command))
    assert ("HIDDEN" in command) == hidden


def test_a_log_that_a_callback_shortens_can_be_saved(tmp_path):
    class Forgets(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            state.log_history = []

    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(
            tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
        ),
        train_dataset=tiny.sentences(16),
        eval_dataset=tiny.sentences(4),
        callbacks=[Forgets()],
    )
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()
    assert "| 4 | 3 | loss |" in card_of(trainer).text
