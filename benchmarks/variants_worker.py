"""One training run of the comparison of variants, and what came out of it; called by variants.py."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, default_data_collator, set_seed
from transformers.utils import logging

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.engine.buckets import Buckets


sys.path.append(str(Path(__file__).parents[1] / "vit_finetune"))
import digits_vit  # noqa: E402 - it stands on modules of that folder


BATCH_SIZE = 64
LEARNING_RATE = 1e-3
# Of the test images: a variant's rho is chosen on the first so many, and its accuracy is that on the others.
VALIDATION = 397


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job` says.

    Args:
        job: `method` ("adamw", "sam" or "sampa"), `variant`, `rho`, `seed` and `epochs`.

    Returns:
        The job with `validation` and `test` accuracy, `seconds_per_step`, forward and backward passes of a whole batch per
        step (`passes`), forward passes without a backward (`forwards`), and `held`: numbers in memory between two steps, per
        trainable weight.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    set_seed(job["seed"])
    train_rows, test_rows = digits_vit.load_rows()
    model, counts = digits_vit.new_model(), {True: 0, False: 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, model, train_rows, folder)

        def count(_, __, inputs) -> None:
            engine = getattr(trainer, "sampa", None)
            if engine is None or not engine.rehearsing:
                counts[torch.is_grad_enabled()] += len(inputs["pixel_values"])

        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        result = trainer.train()
        handle.remove()
        samples = len(train_rows) * job["epochs"]
        correct = accuracy_by_row(trainer, test_rows)
    return {
        **job,
        "validation": correct[:VALIDATION].mean().item(),
        "test": correct[VALIDATION:].mean().item(),
        "seconds_per_step": result.metrics["train_runtime"] / trainer.state.global_step,
        "passes": counts[True] / samples,
        "forwards": counts[False] / samples,
        "held": held(trainer) / sum(param.numel() for param in model.parameters()),
    }


def make_trainer(job: dict[str, Any], model: torch.nn.Module, train_rows: list[dict], folder: str) -> Trainer:
    settings = {
        "output_dir": folder,
        "use_cpu": True,
        "seed": job["seed"],
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 512,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": job["epochs"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch",
    }
    if job["method"] == "adamw":
        return Trainer(model=model, args=SAMPaTrainingArguments(**settings), train_dataset=train_rows)
    settings |= {"method": job["method"], "variant": job["variant"], "rho": job["rho"]}
    return SAMPaTrainer(model=model, args=SAMPaTrainingArguments(**settings), train_dataset=train_rows)


def accuracy_by_row(trainer: Trainer, rows: list[dict]) -> np.ndarray:
    """Whether the model is right about each row, ``(n,)``."""
    trainer.model.eval()
    with torch.no_grad():
        batch = default_data_collator(rows)
        predicted = trainer.model(pixel_values=batch["pixel_values"]).logits.argmax(dim=1)
    return (predicted == batch["labels"]).numpy().astype(float)


def held(trainer: Trainer) -> int:
    """Floating point numbers that weights, gradients, optimizer, engine and variant hold between two steps."""
    engine = getattr(trainer, "sampa", None)
    tensors = [*trainer.model.parameters(), *(param.grad for param in trainer.model.parameters())]
    tensors += list(tensors_in(trainer.optimizer.state_dict()["state"]))
    if engine is None:
        tensors += [torch.empty_like(param) for param in trainer.model.parameters()]  # Trainer drops gradients at once
    else:
        tensors += list(tensors_in([vars(engine), [vars(part) for part in engine.recipe.parts().values()]]))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors if each is not None}
    return sum(storage.nbytes() for storage in storages.values()) // 4


def tensors_in(item: Any) -> Iterable[torch.Tensor]:
    """All tensors in nested containers and in the buckets among them."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, Buckets):
        yield from item.flats
    elif isinstance(item, dict):
        yield from tensors_in(list(item.values()))
    elif isinstance(item, list | tuple):
        for each in item:
            yield from tensors_in(each)
