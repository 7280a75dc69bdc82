"""What the benchmarks train: a BERT on random tokens, by Trainer or SAMPaTrainer with the default AdamW beneath."""

from __future__ import annotations

import tempfile

import torch
from torch.profiler import record_function
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments


class LabelledTrainer(Trainer):
    """Plain Trainer with the labels that SAMPaTrainer puts on its phases, so that a profile shows both alike."""

    def get_batch_samples(self, *args, **kwargs):
        with record_function("SAMPa.data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with record_function("SAMPa.gradient"):
            return super().training_step(*args, **kwargs)


def build_model(layers: int, hidden: int) -> BertForSequenceClassification:
    """A BERT of random weights with BERT's own proportions: heads of 32 units, feed-forward four times as wide."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
        )
    )


def build_dataset(rows: int, seq: int) -> list[dict[str, torch.Tensor]]:
    """`rows` sequences of `seq` random token numbers, without padding, each with a label of 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30000, (rows, seq), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    mask = torch.ones(seq, dtype=torch.long)
    return [{"input_ids": t, "attention_mask": mask, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def make_trainer(
    method: str,
    callback: TrainerCallback,
    *,
    layers: int,
    hidden: int,
    batch: int,
    seq: int,
    max_steps: int,
    bf16: bool,
    use_cpu: bool,
    accumulation: int = 1,
) -> Trainer:
    """A trainer of `method`, one of `bench_processes.METHODS`, that logs nothing to the standard output."""
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": max_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": use_cpu,
        "bf16": bf16,
        "optim": "adamw_torch_fused",  # the default, but for torch before 2.8
    }
    if method in ("adamw", "adamw_ddp"):
        trainer_class, args = LabelledTrainer, TrainingArguments(**settings)
    elif method == "sampa_sharded":
        trainer_class, args = SAMPaTrainer, SAMPaTrainingArguments(shard_optimizer=True, **settings)
    else:
        trainer_class, args = SAMPaTrainer, SAMPaTrainingArguments(method=method.split("_")[0], **settings)
    # One batch more than there are steps: SAMPa reads one ahead.
    dataset = build_dataset((max_steps + 1) * batch * accumulation, seq)
    trainer = trainer_class(build_model(layers, hidden), args, train_dataset=dataset, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # the output belongs to the answers
    return trainer
