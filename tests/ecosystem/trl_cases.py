"""Cases of TRL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_sampa import SAMPaArgumentsMixin, SAMPaMixin
from tests.ecosystem import models
from tests.ecosystem.runs import Case


@dataclass
class SFTArguments(SAMPaArgumentsMixin, SFTConfig): ...


class SAMPaSFTTrainer(SAMPaMixin, SFTTrainer): ...


@dataclass
class RewardArguments(SAMPaArgumentsMixin, RewardConfig): ...


class SAMPaRewardTrainer(SAMPaMixin, RewardTrainer): ...


@dataclass
class DPOArguments(SAMPaArgumentsMixin, DPOConfig): ...


class SAMPaDPOTrainer(SAMPaMixin, DPOTrainer): ...


@dataclass
class KTOArguments(SAMPaArgumentsMixin, KTOConfig): ...


class SAMPaKTOTrainer(SAMPaMixin, KTOTrainer): ...


def data(columns: dict[str, list], **others: Any) -> dict[str, Any]:
    """What every trainer of TRL is given: a tokenizer, and data of which the first eight evaluate."""
    dataset = Dataset.from_dict(columns)
    return {
        "processing_class": models.tokenizer(),
        "train_dataset": dataset,
        "eval_dataset": dataset.select(range(8)),
        **others,
    }


def documents(model, start: Path, samples: int, words: tuple[int, ...] = (8,)) -> dict[str, Any]:
    """Texts of as many words as `words` says in turn."""
    return data({"text": [models.text(i, words[i % len(words)]) for i in range(samples)]})


def completions(model, start: Path, samples: int, **others: Any) -> dict[str, Any]:
    """Prompts and what follows them, of as many words each as the next."""
    return data({"prompt": models.texts(samples, 4), "completion": models.texts(samples, 5, shift=3)}, **others)


def conversations(model, start: Path, samples: int) -> dict[str, Any]:
    """A question and an answer each."""
    return data(
        {
            "messages": [
                [
                    {"role": "user", "content": models.text(i, 4)},
                    {"role": "assistant", "content": models.text(i + 3, 5)},
                ]
                for i in range(samples)
            ]
        }
    )


def with_adapters(model, start: Path, samples: int) -> dict[str, Any]:
    """Texts, and adapters that the trainer is to put into the model."""
    config = LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return {**documents(model, start, samples), "peft_config": config}


def preferences(model, start: Path, samples: int) -> dict[str, Any]:
    """Prompts with an answer that is better than another one, which its last word tells."""
    return data(
        {
            "prompt": models.texts(samples, 4),
            "chosen": [f"{text} w1" for text in models.texts(samples, 4, shift=3)],
            "rejected": [f"{text} w2" for text in models.texts(samples, 4, shift=9)],
        }
    )


def with_reference(model, start: Path, samples: int) -> dict[str, Any]:
    """Preferences, and a model to compare with."""
    reference = load_language_model(models.path(start, "llama", dropout=False))
    return {**preferences(model, start, samples), "ref_model": reference, "data_collator": None}


def judged(model, start: Path, samples: int) -> dict[str, Any]:
    """Prompts with an answer that is good or bad; every third one is bad."""
    return data(
        {
            "prompt": models.texts(samples, 4),
            "completion": models.texts(samples, 5, shift=3),
            "label": [i % 3 > 0 for i in range(samples)],
        }
    )


def load_language_model(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_reward_model(folder: str):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)


def load_adapters(folder: str):
    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model) -> torch.Tensor:
    """Of two sentences of one length."""
    return model(input_ids=torch.tensor([[7, 8, 9, 10, 11, 12], [30, 20, 10, 5, 6, 7]])).logits


FP32 = {"bf16": False}
SFT = Case(
    "as it comes",
    SAMPaSFTTrainer,
    SFTArguments,
    (SFTTrainer, SFTConfig),
    "llama",
    load_language_model,
    documents,
    logits,
    settings={"max_length": 32},
)
DPO = Case(
    "reference from the model's folder",
    SAMPaDPOTrainer,
    DPOArguments,
    (DPOTrainer, DPOConfig),
    "llama",
    load_language_model,
    preferences,
    logits,
    settings=FP32,
)
CASES = [
    SFT,
    replace(
        SFT,
        title="packing",
        inputs=partial(documents, words=(5, 8, 3)),
        settings={**FP32, "max_length": 12, "packing": True},
        evaluates_alike=False,  # rows are not spread evenly over two processes
    ),
    replace(SFT, title="completions only", inputs=completions, settings={**FP32, "max_length": 32}, whole=True),
    replace(
        SFT,
        title="assistant only",
        inputs=conversations,
        settings={**FP32, "max_length": 32, "assistant_only_loss": True},
        whole=True,
    ),
    replace(
        SFT,
        title="LoRA by peft_config",
        inputs=with_adapters,
        saved=load_adapters,
        settings={**FP32, "max_length": 32},
    ),
    replace(SFT, title="mixture of experts", model="mixtral", settings={**FP32, "max_length": 32}),
    replace(
        SFT,
        title="sampa_start",
        settings={**FP32, "max_length": 32, "sampa_start": 4},
        limits={"rho = lambda = 0 is the library's": "to rounding: the halves of a batch are added up"},
    ),
    Case(
        "as it comes",
        SAMPaRewardTrainer,
        RewardArguments,
        (RewardTrainer, RewardConfig),
        "llama-reward",
        load_reward_model,
        preferences,
        logits,
        settings=FP32,
    ),
    replace(DPO, whole=True),
    replace(
        DPO,
        title="sampa_start",
        settings={**FP32, "sampa_start": 4},
        limits={"rho = lambda = 0 is the library's": "to rounding: the halves of a batch are added up"},
    ),
    replace(
        DPO,
        title="ref_model and the rest by position",
        inputs=with_reference,
        positional=(
            "model",
            "ref_model",
            "args",
            "data_collator",
            "train_dataset",
            "eval_dataset",
            "processing_class",
        ),
    ),
    Case(
        "as it comes",
        SAMPaKTOTrainer,
        KTOArguments,
        (KTOTrainer, KTOConfig),
        "llama",
        load_language_model,
        judged,
        logits,
        settings=FP32,
        evaluates_alike=False,  # its loss has the mean KL divergence over all processes in it
    ),
]
