"""A small ViT on scikit-learn's handwritten digits, part of the training labels wrong: a script of one's own with SAMPa.

    PYTHONPATH=vit_finetune accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml \
        benchmarks/digits_vit.py --method sampa --output_dir out/digits

The 1797 images of 8 x 8 grey values come with scikit-learn. demo.py runs this once for each method.
"""

from __future__ import annotations

import torch
from image_predictions import compute_accuracy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, set_seed
from vit_arguments import ViTTrainingArguments

from hf_sampa import SAMPaTrainer
from hf_sampa.finetuning import BaselineTrainer, corrupt_labels, train_and_score


LABEL_NOISE = 0.4
NUM_CLASSES = 10


def load_rows() -> tuple[list[dict], list[dict]]:
    """1000 training and 797 test rows ``{"pixel_values": (1, 8, 8), "labels": int}``; 40 % of the former mislabelled."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # from 0 ... 16 to -1 ... 1
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=797, random_state=0, stratify=digits.target
    )
    train_labels = corrupt_labels(train_labels, LABEL_NOISE, NUM_CLASSES, seed=0)
    return _rows(train_images, train_labels), _rows(test_images, test_labels)


def _rows(images: torch.Tensor, labels) -> list[dict]:
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


def new_model() -> ViTForImageClassification:
    """A ViT of 0.1 million random weights that reads 4 patches of 4 x 4 pixels."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=NUM_CLASSES,
    )
    return ViTForImageClassification(config)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate with the command line `argv`, and return the metrics on the test images."""
    (args,) = HfArgumentParser(ViTTrainingArguments).parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    train_rows, test_rows = load_rows()
    trainer_class = BaselineTrainer if args.method == "adamw" else SAMPaTrainer
    trainer = trainer_class(
        model=new_model(),
        args=args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        compute_metrics=compute_accuracy,
    )
    return train_and_score(trainer, scores=["accuracy"])


if __name__ == "__main__":
    main()
