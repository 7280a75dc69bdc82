"""What a card says, from log lines and settings."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from hf_sampa import SAMPaTrainer, card_facts
from hf_sampa.model_card import is_somebodys
from hf_sampa.recipe import Recipe
from hf_sampa.variants.directions import Smoothed
from tests import models, tiny


def trainer_of(history, **state):
    args = SimpleNamespace(load_best_model_at_end=state.pop("load_best_model_at_end", False))
    state = SimpleNamespace(log_history=history, best_global_step=None, **state)
    return SimpleNamespace(state=state, args=args, eval_dataset=None)


def evaluated(step, accuracy):
    return {"eval_loss": 1 / step, "eval_accuracy": accuracy, "eval_runtime": 2.0, "step": step, "epoch": step / 4}


def logged(step):
    return {"loss": 1.0 / step, "perturbed_loss": 2.0 / step, "sharpness": 1.0 / step, "step": step, "epoch": step / 4}


END = {"train_runtime": 10.0, "train_loss": 0.5, "step": 8, "epoch": 2.0}


def test_the_results_are_those_of_the_weights_that_are_saved():
    history = [logged(4), evaluated(4, 0.9), logged(8), evaluated(8, 0.8), END]
    assert card_facts.evaluation(trainer_of(history)) == {"eval_loss": 1 / 8, "eval_accuracy": 0.8}
    best = trainer_of(history, load_best_model_at_end=True)
    best.state.best_global_step = 4
    assert card_facts.evaluation(best)["eval_accuracy"] == 0.9
    best.state.log_history = [*history, evaluated(8, 0.85)]  # afterwards, of the best weights
    assert card_facts.evaluation(best)["eval_accuracy"] == 0.85
    assert card_facts.evaluation(trainer_of([logged(4)])) == {}


def test_every_metric_is_in_the_model_index_whatever_is_known_of_the_data():
    trainer = trainer_of([{"eval_a_loss": 0.5, "eval_a_f1": 0.7, "step": 4}, {"eval_a_b_f1": float("nan"), "step": 4}])
    trainer.eval_dataset = {"a": 1, "a_b": 2}
    unknown = {"name": None, "type": None, "config": None, "split": "validation"}
    found = card_facts.results(trainer, "text-classification", unknown)
    assert [(each.dataset_split, each.metric_type, each.metric_value) for each in found] == [
        ("validation_a", "loss", 0.5),
        ("validation_a", "f1", 0.7),
        ("validation_a_b", "f1", "nan"),
    ]
    assert {each.dataset_type for each in found} == {"unknown"}


def test_the_curve_has_a_line_for_each_evaluation_or_for_each_log_line():
    lines = card_facts.curve([logged(2), logged(4), evaluated(4, 0.9), logged(8), evaluated(8, 0.8), END]).splitlines()
    assert lines[0] == "| step | epoch | loss | perturbed loss | sharpness | eval loss | eval accuracy |"
    assert lines[2:] == [
        "| 4 | 1 | 0.25 | 0.5 | 0.25 | 0.25 | 0.9 |",
        "| 8 | 2 | 0.125 | 0.25 | 0.125 | 0.125 | 0.8 |",
    ]
    assert len(card_facts.curve([logged(2), logged(4), END]).splitlines()) == 4
    assert card_facts.curve([END]) == ""
    long = card_facts.curve([logged(step) for step in range(1, 92)]).splitlines()
    assert long[2].startswith("| 3 |") and long[-3].startswith("| 91 |") and len(long) == 2 + 23 + 2
    assert long[-1] == "Of the logged lines, one in 4 is shown."


@pytest.mark.parametrize(
    ("world_size", "words", "expected"),
    [
        (1, ["--rho", "0.1"], "python glue/run.py --rho 0.1"),
        (2, ["--output_dir", "my model"], "torchrun --nproc_per_node 2 glue/run.py --output_dir 'my model'"),
        (1, ["--hub_token", "secret", "--x"], "python glue/run.py --hub_token HIDDEN --x"),
        (1, ["--push-to-hub-token=secret"], "python glue/run.py --push-to-hub-token=HIDDEN"),
        (1, ["--hub_token=a=b"], "python glue/run.py --hub_token=HIDDEN"),
        (1, ["--hub_token", "ab=cd"], "python glue/run.py --hub_token HIDDEN"),
        (1, ["--wandb_key=abc", "--token", "abc"], "python glue/run.py --wandb_key=HIDDEN --token HIDDEN"),
        (1, ["--tokenizer", "x", "--max_tokens=3"], "python glue/run.py --tokenizer x --max_tokens=3"),
        (1, ["--word", "hf_abc"], "python glue/run.py --word HIDDEN"),
        (1, ["--key", "hf_abc"], "python glue/run.py --key HIDDEN"),
        (1, ["--key=hf_abc"], "python glue/run.py --key=HIDDEN"),
    ],
)
def test_the_command_is_the_one_that_started_the_run_without_secrets(world_size, words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["glue/run.py", *words])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world_size))
    assert card_facts.command(world_size) == f"```bash\n{expected}\n```"


def test_several_nodes_and_threads_are_in_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "OMP_NUM_THREADS=1 torchrun --nnodes 3 --nproc_per_node 2 train.py" in card_facts.command(6)


@pytest.mark.parametrize("script", ["-c", "/usr/lib/python3/ipykernel_launcher.py"])
def test_no_command_where_there_is_no_script(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert card_facts.command(1).startswith("Not from a script")


def trained(folder, recipe=None, model=tiny.bert, resume=None, **changes):
    trainer = SAMPaTrainer(
        model=model(),
        recipe=recipe,
        args=tiny.arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, **changes),
        train_dataset=tiny.sentences(8),
    )
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
