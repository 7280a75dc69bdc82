"""Cases of transformers itself: losses that reduce numbers over the processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from tests.ecosystem.runs import Case


def boxed(model, start: Path, samples: int) -> dict[str, Any]:
    """Images with one box or two, of which the first eight evaluate."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(samples):
        boxes = 1 + i % 2
        labels = {
            "class_labels": torch.tensor([i % 3, 1])[:boxes],
            "boxes": torch.rand(boxes, 4, generator=generator) / 2 + 0.1,
        }
        items.append({"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": labels})
    return {"train_dataset": items, "eval_dataset": items[:8], "data_collator": collate}


def collate(items: list[dict]) -> dict[str, Any]:
    """Labels stay apart, as detection models take them."""
    return {"pixel_values": torch.stack([i["pixel_values"] for i in items]), "labels": [i["labels"] for i in items]}


def load(folder: str):
    return AutoModelForObjectDetection.from_pretrained(folder)


def logits(model) -> torch.Tensor:
    return model(pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))).logits


CASES = [
    Case(
        "YOLOS, boxes counted over the processes",
        SAMPaTrainer,
        SAMPaTrainingArguments,
        (Trainer, TrainingArguments),
        "yolos",
        load,
        boxed,
        logits,
        settings={"remove_unused_columns": False, "prediction_loss_only": True},
        # The model divides by the boxes of all processes, and by the processes once more.
        evaluates_alike=False,
    ),
]
