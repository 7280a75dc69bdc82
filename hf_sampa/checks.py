"""Worlds, models and data that SAMPa refuses, each with what to do about it."""

from __future__ import annotations

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from .training_args import launched_world_size


def check_trainer(trainer: Trainer) -> None:
    """Raise ValueError where the processes of `trainer` cannot carry SAMPa."""
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"SAMPa runs on one device per process, but this process would spread DataParallel over {args.n_gpu} GPUs. "
            f"Start it with `accelerate launch --num_processes {args.n_gpu - args.n_gpu % 2}`, or set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )
    if launched_world_size() != args.world_size:
        raise ValueError(
            f"The launcher started {launched_world_size()} processes, but this trainer sees a world of "
            f"{args.world_size}: each process would train alone. Pass --use_cpu on machines without accelerators, and "
            "create the training arguments only after the launcher has set its environment."
        )


def check_model(model: torch.nn.Module) -> None:
    """Raise ValueError where `model` has nothing to train, or trains in half precision."""
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise ValueError(
            "Expected at least one trainable parameter, but requires_grad is False for all of the model's. Unfreeze "
            "some before training."
        )
    for name, param in trainable.items():
        if param.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"Expected trainable weights in float32, but {name!r} is {param.dtype}: a perturbation of radius rho is "
                "rounded away in it. Load the model with from_pretrained(..., dtype=torch.float32); bf16=True still "
                "computes in half precision."
            )


def check_dataset(dataset) -> None:
    """Raise ValueError where `dataset` has no sample; samplers would say less."""
    if dataset is not None and has_length(dataset) and not len(dataset):
        raise ValueError("Expected a training dataset of at least one sample, but got an empty one.")


def check_loader(loader, args) -> None:
    """Raise ValueError where an epoch of `loader` would have no batch."""
    if not has_length(loader) or len(loader):
        return
    raise ValueError(
        f"Expected a training dataset of at least one batch, but got {len(loader.dataset)} sample(s) for batches of "
        f"{args.per_device_train_batch_size} on {args.num_replicas} replica(s) with dataloader_drop_last="
        f"{args.dataloader_drop_last}: use a smaller batch, or keep the last one."
    )
