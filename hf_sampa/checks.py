"""Worlds, models and data that SAMPa refuses, each with what to do about it."""

from __future__ import annotations

import torch
from accelerate.logging import get_logger
from transformers import Trainer
from transformers.trainer_utils import has_length

from .training_args import launched_world_size


logger = get_logger(__name__)


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
    if args.device.type == "mps":
        raise ValueError(
            "SAMPa adds up norms in double precision, which this device (mps) does not have. Pass --use_cpu, or train on "
            "a machine with a CUDA device."
        )
    if args.fp16 and args.device.type == "cpu":
        logger.warning("fp16: Trainer has it on GPUs only, so that this run computes in fp32. On a CPU use bf16.")
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            f"auto_find_batch_size lets one process start again while the other waits for it, so it needs a world of "
            f"one, but got {args.world_size} processes. Find the batch size with one process, and set it."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Raise ValueError where `optimizer` trains tensors that the look-ahead could not put back."""
    known = {id(param) for param in model.parameters()}
    foreign = [
        p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and id(p) not in known
    ]
    if foreign:
        raise ValueError(
            f"Expected an optimizer of the model's parameters, but {len(foreign)} of its tensors, the first of shape "
            f"{tuple(foreign[0].shape)}, are not among them. Register them in the model, as parameters of a module."
        )


def check_trainable(model: torch.nn.Module, params: list[torch.nn.Parameter]) -> None:
    """Raise ValueError where the trainable parameters of `model` are no longer `params`."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    if len(trainable) != len(params) or any(a is not b for a, b in zip(trainable, params, strict=True)):
        raise ValueError(
            f"Expected the {len(params)} trainable parameters that the run began with, but requires_grad changed during "
            f"training and there are {len(trainable)} now. Freeze and unfreeze between two calls of train()."
        )


def check_model(model: torch.nn.Module) -> None:
    """Raise ValueError where `model` has nothing to train, or trains in a way that two processes could not share.

    That is: in half precision, one memory under two names, or by sparse gradients.
    """
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
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and any(param.requires_grad for param in module.parameters(recurse=False)):
            raise ValueError(
                f"Expected dense gradients, but {name!r}, a {type(module).__name__} with sparse=True, makes sparse ones. "
                "Build it with sparse=False, or freeze it."
            )
    for one, other in overlapping({**dict(model.named_parameters()), **dict(model.named_buffers())}):
        if one in trainable or other in trainable:
            raise ValueError(
                f"Expected every trainable parameter to have memory of its own, but {one!r} and {other!r} share theirs: "
                "when the one is moved to perturbed weights, the other would stay. Tie them as one Parameter."
            )


def overlapping(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors have an entry in common."""
    pairs, before = [], []
    for start, end, name in sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel()):
        before = [other for other in before if other[1] > start]
        pairs += [(other, name) for *_, other in before if _meet(tensors[other], tensors[name])]
        before.append((start, end, name))
    return pairs


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the memory of `tensor` begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors whose spans overlap have an entry in common; columns of one matrix have not."""
    if one.element_size() != other.element_size():
        return True
    start = min(one.data_ptr(), other.data_ptr())
    places = torch.zeros((max(_span(one)[1], _span(other)[1]) - start) // one.element_size(), dtype=torch.bool)
    first, second = (
        places.as_strided(each.shape, each.stride(), (each.data_ptr() - start) // each.element_size())
        for each in (one, other)
    )
    first.fill_(True)
    return bool(second.any())


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
