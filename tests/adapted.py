"""Small models with LoRA adapters, and texts for them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from tests import tiny


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


class Rows(Dataset):
    """Texts of one length, or of several."""

    def __init__(self, ragged: bool = False, count: int = 48, causal: bool = False):
        dice = torch.Generator().manual_seed(3)
        self.causal = causal
        lengths = torch.randint(9, 14, (count,), generator=dice).tolist() if ragged else [12] * count
        self.rows = [torch.randint(1, 20, (length,), generator=dice).tolist() for length in lengths]
        self.labels = torch.randint(0, 2, (count,), generator=dice).tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index], self.labels[index]

    def collate(self, rows):
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
        labels = ids.masked_fill(mask == 0, -100) if self.causal else torch.tensor([label for _, label in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora(**settings):
    return LoraConfig(
        **{"task_type": "SEQ_CLS", "r": 2, "lora_dropout": 0.1, "target_modules": ["query", "value"], **settings}
    )


def bert(config=None):
    torch.manual_seed(0)
    return get_peft_model(tiny.bert_of_three_layers(), config or lora())


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    return get_peft_model(model, lora(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True))


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1))
    return get_peft_model(model, lora(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], use_rslora=True))


# ---- Quantized models ----


def four_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[])


def eight_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def rounded_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTIZED = [four_bits, eight_bits, rounded_by_torchao]


def quantized_llama(folder, config):
    """What makes the model."""
    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)

    def make():
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        return get_peft_model(base, lora(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))

    return make
