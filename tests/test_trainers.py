"""SAMPa over other trainers, and everything around the training loop."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sampa import SAMPaArgumentsMixin, SAMPaMixin, SAMPaTrainer, SAMPaTrainingArguments
from tests import tiny


@dataclass
class Seq2SeqArguments(SAMPaArgumentsMixin, Seq2SeqTrainingArguments):
    pass


class SAMPaSeq2SeqTrainer(SAMPaMixin, Seq2SeqTrainer):
    pass


def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=60,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            pad_token_id=1,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


def test_over_seq2seq_trainer(tmp_path):
    """Accumulation must not change what is learned although the micro-batches count different numbers of labels."""
    items = [
        {"input_ids": item["input_ids"], "labels": torch.where(torch.arange(8) < 2 + i % 6, item["input_ids"], -100)}
        for i, item in enumerate(tiny.sentences(16))
    ]
    settings = {"use_cpu": True, "report_to": "none", "optim": "sgd", "learning_rate": 0.1, "max_steps": 4}
    settings |= {"train_sampling_strategy": "sequential", "predict_with_generate": True, "generation_max_length": 8}
    outcomes = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        args = Seq2SeqArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        trainer = SAMPaSeq2SeqTrainer(model=bart(), args=args, train_dataset=items, eval_dataset=items[:4])
        trainer.train()
        outcomes.append(dict(trainer.model.named_parameters()))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(outcomes[0]["model.shared.weight"], bart().model.shared.weight)
    assert trainer.predict(items[:4]).predictions.shape[0] == 4


class Own(Trainer):
    """A trainer in which everything is its author's own."""

    calls: set[str] = set()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls.add("compute_loss")
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        self.calls.add("create_optimizer")
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        return self.optimizer

    def get_train_dataloader(self):
        self.calls.add("get_train_dataloader")
        generator = torch.Generator().manual_seed(7)
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True, generator=generator, collate_fn=tiny.Mean())

    def training_step(self, *args, **kwargs):
        self.calls.add("training_step")
        return super().training_step(*args, **kwargs)


class OwnAbove(SAMPaMixin, Own):
    pass


class OwnBelow(SAMPaTrainer):
    compute_loss, create_optimizer, get_train_dataloader = (
        Own.compute_loss,
        Own.create_optimizer,
        Own.get_train_dataloader,
    )
    calls: set[str] = set()


@pytest.mark.parametrize("trainer_class", [OwnAbove, OwnBelow])
def test_over_a_trainer_with_methods_of_its_own(tmp_path, trainer_class):
    trainer_class.calls = set()
    outcome = tiny.run(tmp_path, tiny.bert, tiny.sentences(18), trainer_class=trainer_class, lmbda=0.5)
    expected = {"compute_loss", "create_optimizer", "get_train_dataloader"}
    assert trainer_class.calls >= expected | ({"training_step"} if trainer_class is OwnAbove else set())
    assert outcome["steps"] == 10
    # the two ways of putting SAMPa and the methods together are one trainer
    other = tiny.run(tmp_path, tiny.bert, tiny.sentences(18), trainer_class=OwnAbove, lmbda=0.5)
    assert tiny.differing(outcome, other) == []


def mean_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def summed_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("compute_loss_func", [mean_loss, summed_loss])
def test_a_loss_function_of_ones_own_under_accumulation(tmp_path, compute_loss_func):
    """Whether it divides by the number of items or returns a mean, the update batch's mean loss is descended."""
    shapes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    plain, own = (
        [
            tiny.run(tmp_path, tiny.bert, tiny.sentences(18), optim="sgd", trainer_kwargs=kwargs, **shape)["weights"]
            for shape in shapes
        ]
        for kwargs in ({}, {"compute_loss_func": compute_loss_func})
    )
    for weights in (plain[1], *own):
        torch.testing.assert_close(weights, plain[0], rtol=1e-4, atol=1e-6)


def test_label_smoothing(tmp_path):
    shapes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    one, several = (
        tiny.run(tmp_path, tiny.bert, tiny.sentences(18), optim="sgd", label_smoothing_factor=0.1, **shape)
        for shape in shapes
    )
    torch.testing.assert_close(one["weights"], several["weights"], rtol=1e-4, atol=1e-6)


def test_logged_numbers(tmp_path):
    """sharpness is f(x~_t; B_t) - f(y_t; B_t) on one batch; loss is the look-ahead loss of the next."""
    logs = tiny.run(tmp_path, tiny.bert, tiny.sentences(16), rho=0.02, max_grad_norm=0.01)["logs"]
    steps = [line for line in logs if "loss" in line]
    for before, line in zip(steps[:-1], steps[1:], strict=True):
        assert line["sharpness"] == pytest.approx(line["perturbed_loss"] - before["loss"], abs=1e-6)
        assert line["sharpness"] > 0
        assert 0.5 < line["ascent_cosine"] <= 1
        assert line["ascent_grad_norm"] > 0.02  # before clipping, as grad_norm is
        assert line["grad_norm"] > 0.02


def test_means_over_the_logging_interval(tmp_path):
    every, some = (
        [line for line in tiny.run(tmp_path, tiny.bert, tiny.sentences(16), logging_steps=n)["logs"] if "loss" in line]
        for n in (1, 4)
    )
    assert len(some) == 2
    for name in ("loss", "perturbed_loss", "sharpness", "ascent_cosine"):
        assert some[0][name] == pytest.approx(sum(line[name] for line in every[:4]) / 4, rel=1e-5)


def test_counts_are_those_of_one_stream(tmp_path):
    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, include_num_input_tokens_seen="all"),
        train_dataset=tiny.sentences(18),
    )
    trainer.train()
    assert trainer.get_total_train_batch_size(trainer.args) == 4
    assert trainer.state.num_input_tokens_seen == 2 * 18 * 8
    assert (trainer.state.global_step, trainer.state.epoch) == (10, 2.0)


class EndsEpochsEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 2 == 0


def test_an_epoch_ended_by_a_callback(tmp_path):
    """The next epoch starts with its own first batch, and rho = lmbda = 0 still is plain Trainer."""
    args = tiny.arguments(tmp_path, rho=0.0, lmbda=0.0)
    trainers = [
        cls(model=tiny.bert(), args=args, train_dataset=tiny.sentences(18), callbacks=[EndsEpochsEarly()])
        for cls in (SAMPaTrainer, Trainer)
    ]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].state.global_step == 4
    assert tiny.differing(trainers[0].model.state_dict(), trainers[1].model.state_dict()) == []


def test_early_stopping_evaluation_and_prediction(tmp_path):
    ratings = iter([3.0, 2.0, 1.0, 0.0, 0.0])
    dataset = tiny.sentences(16)
    trainer = SAMPaTrainer(
        model=tiny.bert(),
        args=tiny.arguments(
            tmp_path,
            num_train_epochs=5,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="rating",
            greater_is_better=True,
        ),
        train_dataset=dataset,
        eval_dataset=dataset[:4],
        compute_metrics=lambda prediction: {"rating": next(ratings)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.epoch == 3
    assert trainer.state.best_metric == 3.0
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.model(**torch.utils.data.default_collate(dataset[:4]))
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predictions = trainer.predict(dataset[:4]).predictions
    torch.testing.assert_close(torch.tensor(predictions), expected.logits)


def test_hyperparameter_search_over_rho(tmp_path):
    seen = []

    class Seeing(SAMPaTrainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            seen.append((self.args.rho, self.sampa.rho))
            return result

    trainer = Seeing(
        model_init=lambda: tiny.bert(),
        args=tiny.arguments(tmp_path, max_steps=2),
        train_dataset=tiny.sentences(16),
        eval_dataset=tiny.sentences(4),
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"rho": trial.suggest_categorical("rho", [0.01, 0.3])},
        n_trials=2,
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert best.hyperparameters["rho"] in (0.01, 0.3)
    assert len(seen) == 2 and all(rho == used for rho, used in seen)


def test_two_runs_of_one_trainer(tmp_path):
    trainer = SAMPaTrainer(
        model=tiny.bert(0.1), args=tiny.arguments(tmp_path, max_steps=3), train_dataset=tiny.sentences(16)
    )
    trainer.train()
    first = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.train()
    assert tiny.differing(first, list(trainer.model.parameters())) != []
    assert trainer.state.global_step == 3


def test_numbers_of_one_run_do_not_reach_the_next(tmp_path):
    """The first log line after a run that ended between two log lines."""
    args = tiny.arguments(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    first, second = ([trainer.train(), trainer.state.log_history[0]][1] for _ in range(2))
    assert first == second


class ModeSwitching(torch.optim.SGD):
    """Like schedule-free optimizers: in evaluation the parameters hold other weights than in training."""

    moved = False

    def _move(self, moved):
        if moved != self.moved:
            self.moved = moved
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.mul_(2.0 if moved else 0.5)

    def train(self):
        self._move(False)

    def eval(self):
        self._move(True)


def test_an_optimizer_that_moves_weights_between_modes(tmp_path):
    def trained(cls, **settings):
        model = tiny.bert()
        dataset, optimizers = tiny.sentences(16), (ModeSwitching(model.parameters(), lr=0.1), None)
        args = tiny.arguments(tmp_path, rho=0.0, lmbda=0.0, **settings)
        trainer = cls(model=model, args=args, train_dataset=dataset, eval_dataset=dataset[:4], optimizers=optimizers)
        trainer.train()
        return trainer.model.state_dict()

    evaluating = {"eval_strategy": "steps", "eval_steps": 2}
    assert tiny.differing(trained(SAMPaTrainer, **evaluating), trained(Trainer, **evaluating)) == []


def test_micro_batches_without_any_label_that_counts(tmp_path):
    items = tiny.tagged_sentences(16)
    for item in items[4:6]:
        item["labels"] = torch.full((8,), -100)
    shapes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    settings = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    one, several = (tiny.run(tmp_path, tiny.token_bert, items, **settings, **shape) for shape in shapes)
    torch.testing.assert_close(one["weights"], several["weights"], rtol=1e-4, atol=1e-6)
    for line, other in zip(one["logs"], several["logs"], strict=True):
        assert line == pytest.approx({**other, "epoch": line["epoch"]}, rel=1e-3, abs=1e-5)


class WithoutLossArguments(torch.nn.Module):
    """A model whose forward takes no ``**kwargs``, so that Trainer counts no items."""

    def __init__(self):
        super().__init__()
        self.bert = tiny.bert()

    def forward(self, input_ids, labels):
        return self.bert(input_ids=input_ids, labels=labels)


def test_ragged_groups_of_a_model_that_takes_no_loss_arguments(tmp_path):
    shapes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}]
    settings = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    one, several = (
        tiny.run(tmp_path, WithoutLossArguments, tiny.sentences(13), **settings, **shape)["weights"]
        for shape in shapes
    )
    torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-6)


def own_loader(generator_seed):
    class OwnLoader(SAMPaTrainer):
        def get_train_dataloader(self):
            generator = torch.Generator().manual_seed(generator_seed)
            return DataLoader(self.train_dataset, batch_size=4, shuffle=True, generator=generator)

    return OwnLoader


def test_the_seed_of_a_loader_of_ones_own_counts(tmp_path):
    outcomes = [
        tiny.run(tmp_path, tiny.bert, tiny.sentences(16), trainer_class=own_loader(seed)) for seed in (7, 7, 8)
    ]
    assert tiny.differing(outcomes[0], outcomes[1]) == []
    assert tiny.differing(outcomes[0]["weights"], outcomes[2]["weights"]) != []


def test_resuming_after_an_epoch_ended_early(tmp_path):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    kwargs = {"trainer_kwargs": {"callbacks": [EndsEpochsEarly()]}}
    whole = tiny.run(tmp_path, tiny.bert, tiny.sentences(18), **settings, **kwargs)
    assert whole["steps"] == 6
    for step in (1, 2, 3):
        kwargs = {"trainer_kwargs": {"callbacks": [EndsEpochsEarly()]}}
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed = tiny.run(tmp_path / "again", tiny.bert, tiny.sentences(18), resume=checkpoint, **settings, **kwargs)
        assert tiny.differing(whole["weights"], resumed["weights"]) == []
        assert resumed["steps"] == 6


def test_resuming_weights_of_two_precisions(tmp_path):
    def mixed(seed=0):
        model = tiny.vit(seed=seed)
        model.vit.to(torch.bfloat16).requires_grad_(False)
        model.vit.layernorm.register_forward_hook(lambda module, inputs, output: output.float())
        model.vit.embeddings.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(), *inputs[1:]))
        return model

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tiny.run(tmp_path, mixed, tiny.images(16), **settings)
    resumed = tiny.run(tmp_path, lambda: mixed(5), tiny.images(16), resume=str(tmp_path / "checkpoint-2"), **settings)
    assert tiny.differing(whole["weights"], resumed["weights"]) == []


def test_no_gradient_means_no_update(tmp_path):
    """A parameter that no loss reaches is not decayed either, as in plain Trainer."""
    model = tiny.bert()
    model.unreached = torch.nn.Parameter(torch.ones(3))
    tiny.run(tmp_path, model, tiny.sentences(16), weight_decay=0.5)
    assert torch.equal(model.unreached, torch.ones(3))


def test_the_default_arguments_are_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Trainer makes its default output folder in the current one
    args = SAMPaTrainer(model=tiny.bert()).args
    assert isinstance(args, SAMPaTrainingArguments)
    assert (args.method, args.rho, args.lmbda) == ("sampa", 0.05, 0.2)


class OwnInit(SAMPaTrainer):
    def __init__(self, model, data):
        super().__init__(model, tiny.arguments("unused"), train_dataset=data)


class ByPosition(Trainer):
    """Takes the arguments as its third."""

    def __init__(self, model, reference=None, args=None, **kwargs):
        super().__init__(model, args, **kwargs)
        self.reference = reference


class SAMPaByPosition(SAMPaMixin, ByPosition):
    pass


def test_signatures_are_those_of_the_trainer_below():
    parameters = [
        list(inspect.signature(kind).parameters) for kind in (Trainer, SAMPaTrainer, SAMPaByPosition, OwnInit)
    ]
    assert parameters[1] == [*parameters[0], "recipe"]
    assert parameters[2:] == [["model", "reference", "args", "recipe", "kwargs"], ["model", "data"]]


def test_arguments_by_position(tmp_path):
    args = tiny.arguments(tmp_path)
    made = [
        SAMPaByPosition(tiny.bert(), "reference", args),
        SAMPaByPosition(tiny.bert(), args=args, reference="reference"),
        SAMPaTrainer(tiny.bert(), args),
    ]
    assert all(trainer.args is args for trainer in made)
    assert made[0].reference == made[1].reference == "reference"
    assert isinstance(SAMPaTrainer(tiny.bert()).args, SAMPaTrainingArguments)


@pytest.mark.parametrize("args", [None, TrainingArguments("unused", use_cpu=True)])
def test_arguments_of_another_class_are_refused(args):
    got = "none" if args is None else "TrainingArguments"
    with pytest.raises(ValueError, match=rf"SAMPaArgumentsMixin and the arguments of ByPosition, .* got {got}\."):
        SAMPaByPosition(tiny.bert(), None, args)
