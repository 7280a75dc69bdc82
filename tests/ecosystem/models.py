"""Small models, a tokenizer and texts for the trainers of other libraries, in folders as users have them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    YolosConfig,
    YolosForObjectDetection,
)


WORDS = [f"w{i}" for i in range(55)]
# What an assistant says is marked, for losses on it alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + ' [SEP]' }}"
    "{% endgeneration %}{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
)
BERT = {"num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60, "hidden_size": 16}
LLAMA = {**BERT, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
MAKERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "llama-reward": (LlamaForSequenceClassification, LlamaConfig, {**LLAMA, "num_labels": 1}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1},
    ),
    # Without a pooler, which no loss reaches: every parameter has a gradient.
    "distilbert": (
        DistilBertModel,
        DistilBertConfig,
        {"vocab_size": 60, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
    ),
    "bert-guide": (BertModel, BertConfig, {**BERT, "num_hidden_layers": 1}),
    "bert-scores": (BertForSequenceClassification, BertConfig, {**BERT, "num_hidden_layers": 2, "num_labels": 1}),
    "bert-words": (BertForMaskedLM, BertConfig, {**BERT, "num_hidden_layers": 2}),
    "yolos": (
        YolosForObjectDetection,
        YolosConfig,
        {
            "image_size": [32, 32],
            "patch_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_detection_tokens": 5,
            "num_labels": 3,
        },
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        bos_token="[CLS]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        chat_template=CHAT_TEMPLATE,
    )


def write(folder: Path) -> None:
    """Write every model of `MAKERS`, with random weights, with dropout and without, each where `path` says."""
    for name, (cls, config, options) in MAKERS.items():
        for dropout in (False, True):
            own = config(**options)
            for each in ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"):
                if hasattr(own, each):
                    setattr(own, each, 0.1 if dropout else 0.0)
            torch.manual_seed(0)
            cls(own).save_pretrained(path(folder, name, dropout))
            tokenizer().save_pretrained(path(folder, name, dropout))


def path(folder: Path, name: str, dropout: bool) -> str:
    """Where in `folder` a model is."""
    return str(folder / (f"{name}-dropout" if dropout else name))


def text(seed: int, words: int = 8) -> str:
    """Words that depend on `seed` alone."""
    return " ".join(WORDS[(7 * seed + place * place) % 55] for place in range(words))


def texts(count: int, words: int = 8, shift: int = 0) -> list[str]:
    """Texts of equally many words."""
    return [text(i + shift, words) for i in range(count)]
