"""Worlds, models and data that SAMPa refuses, each with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import Trainer
from transformers.trainer_utils import has_length

from .distributed import groups_of_modules, here
from .training_args import launched_world_size, named_world_size


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
            f"The environment variable {named_world_size()} says that a launcher started {launched_world_size()} processes, but "
            f"this trainer sees a world of {args.world_size}: each process would train alone. Pass --use_cpu on machines "
            "without accelerators, and create the training arguments only after the launcher has set its environment. If no "
            f"launcher started this process, the variable is left from elsewhere: unset {named_world_size()}."
        )
    if args.device.type == "mps":
        raise ValueError(
            "SAMPa adds up norms in double precision, which this device (mps) does not have. Pass --use_cpu, or train on "
            "a machine with a CUDA device."
        )
    if args.fp16 and args.device.type == "cpu":
        logger.warning("fp16: Trainer has it on GPUs only, so that this run computes in fp32. On a CPU use bf16.")
    if args.save_on_each_node and int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) < args.world_size:
        raise ValueError(
            "save_on_each_node: expected False, because transformers writes weights on the first machine alone: no run could go "
            "on from what the others have. Let all machines write to one disk."
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            f"auto_find_batch_size lets one process start again while the other waits for it, so it needs a world of "
            f"one, but got {args.world_size} processes. Find the batch size with one process, and set it."
        )


IN_BACKWARD = {"LOMO", "AdaLOMO", "Lomo", "AdaLomo", "LayerWiseDummyOptimizer"}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where the weights are updated by something else than the optimizer's step."""
    kind = type(optimizer)
    if IN_BACKWARD & {each.__name__ for each in kind.__mro__}:
        raise ValueError(
            f"optim: expected an optimizer whose step comes after backward, got {kind.__module__}.{kind.__qualname__}, which "
            "updates during backward, while the weights are displaced. Use another one, as optim='adamw_torch'."
        )


def check_not_compiled(model: torch.nn.Module, args: Any) -> None:
    """Raise ValueError where `model` is compiled, for a variant that changes what its layers compute: a compiled one goes on as it was."""
    parts = (model, *model.modules())
    if args.torch_compile or any(hasattr(each, "_orig_mod") or each._compiled_call_impl for each in parts):
        raise ValueError(
            "torch_compile: expected a model that is not compiled for a variant that adds to what layers with adapters compute, got one that "
            "is. Set torch_compile=False, and leave torch.compile out."
        )


def check_trainable(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]
) -> None:
    """Raise ValueError where what `optimizer` and `model` hold of trainable parameters is no longer `params`."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    frozen = [param for param in params if not param.requires_grad]
    held = {id(param) for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
    moved = any(a is not b for a, b in zip_longest(trainable, params[: len(trainable)]))
    if frozen or moved or held != {id(param) for param in params}:
        raise ValueError(
            f"Expected the {len(params)} trainable parameters that the run began with, but requires_grad, the model or the "
            f"optimizer changed during training: {len(frozen)} of them are frozen, the model has {len(trainable)} trainable ones, "
            f"the optimizer holds {len(held)}. "
            "Do that before train() (on_train_begin is too late), or between two calls of it, with trainer.optimizer = "
            "trainer.lr_scheduler = None before the second."
        )


def check_settings_kept(args, before: dict[str, Any]) -> None:
    """Raise ValueError where a setting is not what it was `before`, and steps cannot follow."""
    for name, value in before.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name}: expected {value!r} throughout, but a callback set it to {getattr(args, name)!r} during the run. "
                "The next batch is read, and its gradient taken, one step ahead with the old value. Set it before train(), or "
                "save, stop, and go on in another run."
            )


def check_groups(modules: dict[str, torch.nn.Module]) -> None:
    """Raise ValueError where a module holds a process group: a step's roles have groups of their own."""
    if found := groups_of_modules(modules):
        name, group = next(iter(found.items()))
        raise ValueError(
            f"Expected modules that use the default process group, which is that of a process's role during a pass, but {name!r} "
            f"holds a group of {group.size()} process(es). Build it without (process_group=None)."
        )


def check_not_generating(kind: type) -> None:
    """Raise ValueError for a trainer whose batches are samples that the model generates within the step."""
    for each in kind.__mro__:
        if each.__module__.startswith("trl.") and each.__name__ in GENERATING:
            raise ValueError(
                f"{each.__name__} generates its samples within the step, with the weights of that moment: g_t and the gradient "
                "at the perturbed weights would come from different samples, and the two processes would train on different "
                f"data. SAMPa needs a batch that is there before the step. Use {each.__name__} without SAMPaMixin, or generate "
                "the data first and train on them, with DPOTrainer, KTOTrainer or SFTTrainer."
            )


# Of TRL: trainers that sample completions while they train.
GENERATING = (
    *("GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer", "PPOTrainer", "GKDTrainer"),
    *(
        "DistillationTrainer",
        "AsyncDistillationTrainer",
        "AsyncGRPOTrainer",
        "A2POTrainer",
        "GOLDTrainer",
        "IWOPDTrainer",
    ),
    *("MiniLLMTrainer", "PAPOTrainer", "SDFTTrainer", "SDPOTrainer"),
)


def check_model(model: torch.nn.Module) -> None:
    """Raise ValueError where `model` has nothing to train, or trains in a way that two processes could not share.

    That is: in half precision, one memory under two names, or by sparse gradients.
    """
    check_entries(model)
    check_aliases(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise ValueError(
            "Expected at least one trainable parameter, but requires_grad is False for all of the model's. Unfreeze "
            "some before training."
        )
    check_precision(trainable)
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and any(param.requires_grad for param in module.parameters(recurse=False)):
            raise ValueError(
                f"Expected dense gradients, but {name!r}, a {type(module).__name__} with sparse=True, makes sparse ones. "
                "Build it with sparse=False, or freeze it."
            )
        if getattr(module, "max_norm", None) is not None and module.weight.requires_grad:
            raise ValueError(
                f"Expected forward to leave trained weights alone, but {name!r}, a {type(module).__name__} with max_norm, "
                "normalises its weight in place, while it is displaced. Build it without, and normalise in a callback (on_step_end)."
            )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for one, other in overlapping({name: here(tensor) for name, tensor in tensors.items()}):
        if one in trainable or other in trainable:
            raise ValueError(
                f"Expected every trainable parameter to have memory of its own, but {one!r} and {other!r} share theirs: "
                "when the one is moved to perturbed weights, the other would stay. Tie them as one Parameter."
            )


def check_entries(model: torch.nn.Module) -> None:
    """Raise ValueError where entries of a trainable parameter share memory. To be asked before the model is moved, which may part them."""
    for name, param in model.named_parameters():
        if param.requires_grad and _meets_itself(param):
            raise ValueError(
                f"Expected every entry of a trainable parameter to have memory of its own, but {name!r} of shape {tuple(param.shape)} "
                f"has strides {param.stride()}, as expand() leaves them: its entries would be moved together on some devices, "
                "and apart on others. Make the small tensor the Parameter and expand it in forward, or call .contiguous() before "
                "making it one."
            )


def check_aliases(model: torch.nn.Module) -> None:
    """Raise ValueError where an attribute of a module is a view of a trainable parameter. To be asked before the model is moved, too."""
    trainable = {name: here(param) for name, param in model.named_parameters() if param.requires_grad}
    aliases = {name: here(tensor) for name, tensor in _attributes(model)}
    for one, other in overlapping(trainable | aliases):
        if (one in trainable) != (other in trainable):
            param, alias = (one, other) if one in trainable else (other, one)
            raise ValueError(
                f"Expected every trainable parameter to have memory of its own, but {alias!r} is a view of {param!r}: when the parameter is "
                "moved to perturbed weights, or the model to a device, the view would stay. Take it in forward instead."
            )


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold besides parameters and buffers, in attributes or in lists and dicts of these."""
    registered = {id(each) for each in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            several = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            for each in several:
                # torch.nn.utils.spectral_norm leaves a view under the name of the weight until forward makes it anew.
                is_made_anew = f"{attribute}_orig" in module._parameters
                if isinstance(each, torch.Tensor) and id(each) not in registered and not is_made_anew:
                    yield f"{name}.{attribute}".lstrip("."), each


def _meets_itself(tensor: torch.Tensor) -> bool:
    """Whether entries of one dimension reach as far as those of the next; so they may have addresses in common."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def check_savable(trainer: Trainer) -> None:
    """Raise ValueError where a run saves, and Trainer would refuse to write the weights."""
    model, kinds = trainer.model, type(trainer).__mro__
    own = [each for each in kinds if not each.__module__.startswith(("hf_sampa.", "transformers."))]
    saves_otherwise = any(name in vars(each) for each in own for name in ("_save", "save_model"))
    if trainer.args.save_strategy == "no" or hasattr(model, "save_pretrained") or saves_otherwise:
        return
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for one, other in overlapping(state)[:1]:
        raise ValueError(
            f"save_strategy: expected 'no', because {one!r} and {other!r} are one tensor, and {type(model).__name__} is no "
            "PreTrainedModel: its weights Trainer would refuse to save. Make it one that names them in _tied_weights_keys, or save "
            "it yourself, by torch.save in a callback (on_step_end)."
        )


def check_precision(trained: dict[str, torch.nn.Parameter]) -> None:
    """Raise ValueError where a trained parameter is in half precision."""
    for name, param in trained.items():
        if param.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"Expected trainable weights in float32, but {name!r} is {param.dtype}: a perturbation of radius rho is "
                "rounded away in it. Load the model with from_pretrained(..., dtype=torch.float32); bf16=True still "
                "computes in half precision."
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
    samples = f"{len(loader.dataset)} sample(s)" if hasattr(loader, "dataset") else "none"
    raise ValueError(
        f"Expected a training dataset of at least one batch, but got {samples} for batches of "
        f"{args.per_device_train_batch_size} on {args.num_replicas} replica(s) with dataloader_drop_last="
        f"{args.dataloader_drop_last}: use a smaller batch, or keep the last one."
    )
