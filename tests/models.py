"""Models that ask more of a step than `tests.tiny`'s: adapters, tied and shared weights, branches."""

from __future__ import annotations

from functools import partial

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from tests import tiny


# Before transformers 5.23 it had another name.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
# Settings of a run whose layers are computed again in backward.
CHECKPOINTED = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
CHECKPOINTED_REENTRANT = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
# Settings of a run with torch.compile, by the backend that compiles fastest.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def compiled_bert(dropout: float = 0.1):
    """BERT to be compiled once: it would note its `problem_type` in its first pass, and be compiled anew."""
    model = tiny.bert(dropout)
    model.config.problem_type = "single_label_classification"
    return model


class Perceptron(nn.Module):
    """Two layers and dropout: as little to compile as possible."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def lora_bert(dropout: float = 0.1):
    """BERT with adapters at queries and values, and a classifier that peft trains as a copy."""
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], lora_dropout=dropout)
    return get_peft_model(tiny.bert(dropout), config)


def frozen_bert(dropout: float = 0.1):
    """BERT with frozen embeddings, and dropout."""
    model = tiny.bert(dropout)
    model.bert.embeddings.requires_grad_(False)
    return model


def masked_bert(dropout: float = 0.1):
    """BERT whose decoder is its word embeddings."""
    return tiny.bert(dropout, head=BertForMaskedLM)


def gpt2(dropout: float = 0.1, vocab_size: int = 60):
    """GPT-2 of two layers, whose decoder is its word embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def gpt2_of_two_buckets():
    """`gpt2` whose word embeddings exceed the 4 MiB that are sent at once."""
    return gpt2(vocab_size=2**16 + 1)


def albert(dropout: float = 0.1):
    """ALBERT: one layer, run three times."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=60,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        classifier_dropout_prob=dropout,
    )
    return AlbertForSequenceClassification(config)


def checkpointed_albert(dropout: float = 0.1):
    """`albert` that recomputes each run of its layer in backward; transformers cannot switch that on for ALBERT."""
    model = albert(dropout)
    (group,) = model.albert.encoder.albert_layer_groups
    group.forward = partial(checkpoint, group.forward, use_reentrant=False)
    return model


class Branches(nn.Module):
    """Two branches, of which the batch's first image chooses one, and a third that is never chosen.

    Attributes:
        chosen: per forward pass, the branch.
    """

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Dropout(dropout)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)
        self.chosen: list[int] = []

    def forward(self, pixel_values, labels=None):
        pixels = pixel_values.flatten(1)
        self.chosen.append(int(pixels[0].sum() > 0))
        logits = self.head(self.branches[self.chosen[-1]](pixels))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def texts(count: int, seed: int = 1) -> list[dict]:
    """Random token sequences, each token with itself as its label, a varying number of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        ids = torch.randint(0, 60, (8,), generator=generator)
        items.append({"input_ids": ids, "labels": torch.where(torch.rand(8, generator=generator) < 0.3, -100, ids)})
    return items


class Drifting(nn.Module):
    """A layer whose own buffers follow the weights and count the forward passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 3)
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, pixel_values, labels=None):
        pixels = pixel_values.flatten(1)
        if self.training:
            self.mean.lerp_(pixels.mean(0) * self.head.weight.detach().mean(), 0.1)
            self.passes = self.passes + 1  # a new tensor in the place of the old one
        logits = self.head(pixels - self.mean)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Spectral(nn.Module):
    """A layer with spectral norm, whose power iteration goes on by one in every forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 8))
        self.body = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(8, 3))

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
