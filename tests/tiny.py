"""Small models, datasets and training runs that the tests share."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments


BERT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def bert(dropout: float = 0.0, head=BertForSequenceClassification, num_labels: int = 2, seed: int = 0):
    """Random BERT of one layer."""
    torch.manual_seed(seed)
    config = BertConfig(
        **BERT, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=num_labels
    )
    return head(config)


def frozen_bert():
    """Random BERT whose embeddings are frozen."""
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    return model


def bert_of_three_layers():
    """Random BERT that is deeper."""
    return BertForSequenceClassification(BertConfig(**{**BERT, "num_hidden_layers": 3}))


def bert_of(shape: dict[str, int]):
    """Random BERT of another shape."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**BERT, **shape}))


def token_bert(dropout: float = 0.0):
    """Random BERT with a token-level head."""
    return bert(dropout, head=BertForTokenClassification, num_labels=3)


def regression_bert():
    """Random BERT that predicts a score."""
    return bert(num_labels=1)


def vit(dropout: float = 0.0, seed: int = 0):
    """Random ViT of one layer for 8 x 8 grey images."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
    )


class BatchNormNet(nn.Module):
    """A small convolutional network whose running statistics count batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows_of_files(rows):
    """Generator for `datasets.IterableDataset.from_generator`; `rows` is a list of files."""
    for file in rows:
        yield from file


def sentences(count: int, lengths: tuple[int, int] = (8, 8), seed: int = 1) -> list[dict[str, Any]]:
    """Random token sequences with a label that depends on the first token."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        ids = torch.randint(0, 60, (length,), generator=generator)
        items.append({"input_ids": ids, "labels": int(ids[0]) % 2})
    return items


def tagged_sentences(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Random token sequences with a label per token, a varying number of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        ids = torch.randint(0, 60, (8,), generator=generator)
        labels = torch.where(torch.rand(8, generator=generator) < 0.3, -100, ids % 3)
        items.append({"input_ids": ids, "labels": labels})
    return items


def scored_sentences(count: int) -> list[dict[str, Any]]:
    """Random token sequences with a score."""
    return [{**item, "labels": float(i % 5)} for i, item in enumerate(sentences(count))]


def images(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Random 8 x 8 grey images with a label."""
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": i % 3} for i in range(count)]


class NoisyImages(Dataset):
    """Images with random augmentation from the global generators."""

    def __init__(self, count: int):
        self.items = images(count)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {**item, "pixel_values": item["pixel_values"] + 0.1 * torch.randn(1, 8, 8)}


class Stream(IterableDataset):
    """Sentences of unknown number, in an order drawn from the global generators."""

    def __init__(self, count: int):
        self.items = sentences(count)

    def __iter__(self):
        for index in torch.randperm(len(self.items)).tolist():
            yield self.items[index]


class Recorder(TrainerCallback):
    """Keeps copies of the weights after every step, and of the log lines."""

    def __init__(self):
        self.weights: list[list[torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append([param.detach().clone() for param in model.parameters()])


REHEARSED = 3  # passes before the first step, which belong to none


class Passes:
    """Counts calls, in a closure: what a pass changes on a trainer is undone but for one per update batch."""

    def __init__(self):
        called: list[Any] = []
        self._add, self._called = called.append, lambda: called

    @property
    def seen(self) -> list[Any]:
        return self._called()

    @property
    def count(self) -> int:
        return len(self.seen)

    def __call__(self, seen=None) -> int:
        self._add(seen)
        return self.count


class Each(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


class Mean:
    """Collator that pads sentences and leaves everything else to stacking."""

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        mask = torch.zeros(len(items), width, dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = item["input_ids"]
            mask[row, : len(item["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def arguments(output_dir, **changes) -> SAMPaTrainingArguments:
    """Arguments of a short run on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
    }
    return SAMPaTrainingArguments(**{**settings, **changes})


def outcome(trainer, resume_from_checkpoint=None) -> dict[str, Any]:
    """Train, and return what two equal runs must have in common."""
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": trainer.optimizer.state_dict(),
        "logs": [
            {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
            for line in trainer.state.log_history
        ],
        "tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
    }


def run(output_dir, model, dataset, trainer_class=SAMPaTrainer, resume=None, trainer_kwargs=None, **changes):
    """`outcome` of a run of `model`, made here so that it can be called on a rank."""
    trainer = trainer_class(
        model=model() if callable(model) and not isinstance(model, torch.nn.Module) else model,
        args=arguments(output_dir, **changes),
        train_dataset=dataset,
        **(trainer_kwargs or {}),
    )
    return outcome(trainer, resume)


def comparable(outcome: dict[str, Any]) -> dict[str, Any]:
    """`outcome` without what belongs to one call of train(): its mean loss."""
    return {**outcome, "logs": [{k: v for k, v in line.items() if k != "train_loss"} for line in outcome["logs"]]}


def without_cosine(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log lines but for the cosine, which of weights that are in several processes is added up in another order, and more exactly."""
    return [{k: v for k, v in line.items() if k != "ascent_cosine"} for line in lines]


def differing(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two nested results differ in any bit; empty where they are equal."""
    if isinstance(left, torch.Tensor):
        return [] if isinstance(right, torch.Tensor) and torch.equal(left, right) else [path]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return [d for key in sorted(keys, key=str) for d in differing(left.get(key), right.get(key), f"{path}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return [d for i, (a, b) in enumerate(zip(left, right, strict=True)) for d in differing(a, b, f"{path}/{i}")]
    equal = left == right or (left != left and right != right)
    return [] if equal else [f"{path}: {left} != {right}"]


@contextmanager
def transformers_log(caplog):
    """Let pytest's `caplog` see what hf_sampa logs at level info and above."""
    own = logging.getLogger("hf_sampa")
    own.addHandler(caplog.handler)
    level = own.level
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        own.setLevel(level)
        own.removeHandler(caplog.handler)
