"""On one process: adapters, checkpointed layers, compilation, running statistics, branches, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from hf_sampa import SAMPaTrainer, compat
from tests import models, reference, tiny


# peft 0.21 asks transformers 5.23 by the old name whether layers are checkpointed.
lora = pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning")


def copies(named) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in named}


class Watching(SAMPaTrainer):
    """Keeps the weights that every forward pass saw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = tiny.Passes()

    @property
    def seen(self) -> list[dict[str, torch.Tensor]]:
        return self.passes.seen

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not self.sampa.rehearsing:
            self.passes(copies(self.model.named_parameters()))
        return super().compute_loss(model, inputs, *args, **kwargs)


@lora
def test_adapters_alone_are_displaced_and_carried(tmp_path):
    """Frozen weights keep their bits inside of steps too, and g_t has no entry for them."""
    model = models.lora_bert()
    before, trainable = copies(model.named_parameters()), {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    args = tiny.arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer = Watching(model=model, args=args, train_dataset=tiny.sentences(16))
    trainer.train()
    assert len(trainer.seen) == 1 + 2 * 3  # the start and two passes a step
    for weights in [*trainer.seen, dict(model.named_parameters())]:
        assert not set(tiny.differing(weights, before)) - {f"/{name}" for name in trainable}
    after = set(tiny.differing(dict(model.named_parameters()), before))
    assert after == {f"/{name}" for name in trainable}
    carried = load_file(tmp_path / "checkpoint-3" / "sampa.safetensors")
    assert {name: value.shape for name, value in carried.items()} == {
        name: value.shape for name, value in before.items() if name in trainable
    }


@lora
def test_adapters_load_with_plain_peft(tmp_path):
    """P9."""
    model = models.lora_bert()
    args = tiny.arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    SAMPaTrainer(model=model, args=args, train_dataset=tiny.sentences(16)).train()
    loaded = PeftModel.from_pretrained(tiny.bert(0.1), tmp_path / "checkpoint-3")
    assert tiny.differing(loaded.state_dict(), model.state_dict()) == []


CHECKPOINTED = {
    "bert": (partial(tiny.bert, 0.1), partial(tiny.bert, 0.1), models.CHECKPOINTED),
    "bert, reentrant": (partial(tiny.bert, 0.1), partial(tiny.bert, 0.1), models.CHECKPOINTED_REENTRANT),
    "gpt2": (models.gpt2, models.gpt2, models.CHECKPOINTED),
    "albert": (models.albert, models.checkpointed_albert, {}),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_layers_compute_the_same(tmp_path, name):
    """Bit for bit, since the second forward draws the first one's dropout masks."""
    *builders, more = CHECKPOINTED[name]
    dataset = models.texts(18) if name == "gpt2" else tiny.sentences(18)
    outcomes, calls = [], []
    for model, settings in zip((build() for build in builders), ({}, more), strict=True):
        calls.append([])
        for module in model.modules():
            module.register_forward_hook(lambda *_, calls=calls[-1]: calls.append(1))
        outcomes.append(tiny.run(tmp_path, model, dataset, gradient_accumulation_steps=2, max_steps=4, **settings))
    assert len(calls[1]) > len(calls[0])
    assert tiny.differing(*outcomes) == []


class Compilations(TrainerCallback):
    """Graphs compiled, after every step."""

    def __init__(self):
        self.graphs: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.mark.skipif(compat.before("torch", "2.9"), reason="torch.compile breaks the graph of this BERT in seven")
def test_a_model_is_compiled_once(tmp_path):
    """One graph serves the start, both roles and every step; numbers are those of eager, the checkpoint is plain."""
    torch._dynamo.reset()
    counters.clear()
    compilations, outcomes = Compilations(), []
    for more in ({}, models.COMPILED):
        args = tiny.arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=5, **more)
        callbacks = [compilations] if more else []
        trainer = SAMPaTrainer(
            model=models.compiled_bert(), args=args, train_dataset=tiny.sentences(16), callbacks=callbacks
        )
        trainer.train()
        outcomes.append(dict(trainer.model.named_parameters()))
    assert compilations.graphs == [1] * 5
    assert not counters["graph_break"]
    torch.testing.assert_close(*outcomes)
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-5")
    assert tiny.differing(dict(saved.named_parameters()), outcomes[1]) == []


def statistics(model) -> dict[str, torch.Tensor]:
    return copies(model.named_buffers())


@pytest.mark.parametrize(("accumulation", "counted"), [(1, 5), (2, 9)])
def test_running_statistics_count_every_look_ahead_batch_once(tmp_path, accumulation, counted):
    """Four steps look at the start's batch and at four more. Epochs are of 5 micro-batches: 2 + 2 + 1, and 2 + 2."""
    model = tiny.BatchNormNet()
    tiny.run(tmp_path, model, tiny.images(18), max_steps=4, gradient_accumulation_steps=accumulation)
    assert statistics(model)["body.1.num_batches_tracked"] == counted


@pytest.mark.parametrize(("method", "counted"), [("sampa", 8), ("sam", 6)])
def test_running_statistics_count_every_shard_once(tmp_path, method, counted):
    """Two shards of each batch: of the start's and three more, or of three."""
    model = tiny.BatchNormNet()
    shards = {"variant": "msam", "variant_args": {"count": 2}}
    tiny.run(tmp_path, model, tiny.images(16), max_steps=3, method=method, **shards)
    assert statistics(model)["body.1.num_batches_tracked"] == counted


@pytest.mark.parametrize("variant", ["esam", "ksam", "mesa", "ausam"])
def test_running_statistics_count_no_look_at_single_samples(tmp_path, variant):
    model = tiny.BatchNormNet()
    chosen = {"variant_args": {"k": 2}} if variant == "ksam" else {}
    tiny.run(tmp_path, model, tiny.images(16), max_steps=5, method="sam", variant=variant, **chosen)
    assert statistics(model)["body.1.num_batches_tracked"] == 5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_statistics_are_those_of_the_look_ahead_weights(tmp_path, accumulation):
    """B_0 at x_0 and B_1 at y_1, as computed here by hand; the perturbation, however large, leaves no trace."""
    dataset, found = tiny.images(16), []
    settings = {
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.1,
    }
    for rho in (0.05, 50.0):
        model = tiny.BatchNormNet()
        tiny.run(tmp_path, model, dataset, rho=rho, **settings)
        found.append(statistics(model))
    assert tiny.differing(*found) == []

    expected = tiny.BatchNormNet()
    args = tiny.arguments(tmp_path, **settings)
    plain = Trainer(model=expected, args=args, train_dataset=dataset)
    plain.create_optimizer_and_scheduler(1)
    first, second = (micro_batches(dataset, accumulation, t) for t in range(2))
    reference.update(expected, plain.optimizer, reference.grad(expected, mean_loss, first), args.max_grad_norm)
    mean_loss(expected, second)
    torch.testing.assert_close(found[0], statistics(expected))


def micro_batches(dataset, accumulation: int, t: int) -> list[dict]:
    """B_t of a sequential stream of micro-batches of four, within the first epoch."""
    starts = range(4 * accumulation * t, 4 * accumulation * (t + 1), 4)
    return [default_collate(dataset[start : start + 4]) for start in starts]


def mean_loss(model, batch: list[dict]) -> torch.Tensor:
    """f(model; batch), in training mode, over micro-batches of one size."""
    return sum(model(**inputs)["loss"] for inputs in batch) / len(batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_branch_without_gradient_counts_as_zero(tmp_path, accumulation):
    """Without momentum and weight decay, a step with a gradient of zero and no step are the same."""
    dataset, steps = tiny.images(4 * accumulation * 7), 6
    args = tiny.arguments(
        tmp_path,
        max_steps=steps,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        weight_decay=0.0,
    )
    model, expected = models.Branches(dropout=0.0), models.Branches(dropout=0.0)
    SAMPaTrainer(model=model, args=args, train_dataset=dataset).train()
    plain = Trainer(model=expected, args=args, train_dataset=dataset)
    plain.create_optimizer_and_scheduler(steps)
    batches = [micro_batches(dataset, accumulation, t) for t in range(steps + 1)]
    reference.sampa(
        expected,
        plain.optimizer,
        plain.lr_scheduler,
        mean_loss,
        batches,
        rho=args.rho,
        lmbda=args.lmbda,
        max_norm=args.max_grad_norm,
    )
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert set(model.chosen) == {0, 1}


def test_a_branch_never_taken_is_left_alone(tmp_path):
    """As plain Trainer does: no weight decay, no moments."""
    model = models.Branches()
    trainer = SAMPaTrainer(model=model, args=tiny.arguments(tmp_path, weight_decay=0.1), train_dataset=tiny.images(18))
    trainer.train()
    assert set(model.chosen) == {0, 1}
    differing = tiny.differing(dict(model.named_parameters()), dict(models.Branches().named_parameters()))
    assert len(differing) == 6
    assert not any(name.startswith("/branches.2") for name in differing)
    assert not any(param in trainer.optimizer.state for param in model.branches[2].parameters())


def test_a_branch_without_gradient_is_not_displaced(tmp_path):
    """Neither perturbed nor, as in a real step, decayed or pushed on by its moments in the look-ahead."""
    model, recorder, steps = models.Branches(), tiny.Recorder(), 8
    x = [[param.detach().clone() for param in model.parameters()]]
    trainer = Watching(
        model=model,
        args=tiny.arguments(tmp_path, max_steps=steps, weight_decay=0.1),
        train_dataset=tiny.images(18),
        callbacks=[recorder],
    )
    trainer.train()
    x += recorder.weights
    del model.chosen[: tiny.REHEARSED]
    names = [name for name, _ in model.named_parameters()]
    # Pass 0 is the start; step t perturbs in pass 2t + 1 and looks ahead in pass 2t + 2. g_t comes from pass 2t.
    for t in range(steps):
        weights = dict(zip(names, x[t], strict=True))
        for seen in trainer.seen[2 * t + 1 : 2 * t + 3]:
            moved = {path.split(".")[1] for path in tiny.differing(seen, weights) if "branches" in path}
            assert moved == {str(model.chosen[2 * t])}
    assert {model.chosen[2 * t] for t in range(steps)} == {0, 1}


def test_autocast_computes_in_half_and_keeps_in_full_precision(tmp_path):
    """Other numbers than in float32, and near to them; weights, moments and g_t stay in float32."""
    full, half = (
        tiny.run(tmp_path, tiny.bert, tiny.sentences(16), max_steps=3, save_strategy="steps", save_steps=3, bf16=bf16)
        for bf16 in (False, True)
    )
    assert tiny.differing(full["weights"], half["weights"]) != []
    torch.testing.assert_close(full["weights"], half["weights"], atol=5e-3, rtol=0)
    kept = [
        *half["weights"].values(),
        *load_file(tmp_path / "checkpoint-3" / "sampa.safetensors").values(),
        *(moments["exp_avg"] for moments in half["optimizer"]["state"].values()),
    ]
    assert {tensor.dtype for tensor in kept if tensor.is_floating_point()} == {torch.float32}


class OneWeight(nn.Module):
    """A model of one parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 3, bias=False)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_a_model_of_one_parameter(tmp_path, method):
    outcome = tiny.run(
        tmp_path, OneWeight, tiny.images(16), max_steps=3, method=method, save_strategy="steps", save_steps=2
    )
    resumed = tiny.run(
        tmp_path, OneWeight, tiny.images(16), max_steps=3, method=method, resume=str(tmp_path / "checkpoint-2")
    )
    assert tiny.differing(tiny.comparable(outcome), tiny.comparable(resumed)) == []
