"""What differs between versions of what this package is built on: which ones work, and what is done for those that do less.

Each difference names the version that it ends with. Code elsewhere is written for the newest versions, so that a difference can be
taken out together with the floor that made it necessary. The room imports nothing of transformers: it looks at what it is given.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.logging import get_logger
from packaging.version import Version
from torch.optim.adam import adam
from torch.optim.adamw import adamw


if TYPE_CHECKING:
    from transformers import Trainer

logger = get_logger(__name__)


class Range(NamedTuple):
    """Versions that the tests were run with (``make test-versions``): the lowest, and the newest that there was."""

    lowest: str
    newest: str


TESTED = {
    "transformers": Range("5.3.0", "5.24.0"),
    "torch": Range("2.6.0", "2.15.0"),
    "accelerate": Range("1.10.1", "1.15.0"),
}

# FSDP2 has a floor of its own. torch 2.6 looks for the processes of a mesh by their ranks in the world, where those of a role have
# others; transformers 5.3 hands few of the settings on; accelerate 1.12 leaves out the moments when it loads an optimizer from parts.
SHARDS = {"torch": "2.9", "transformers": "5.12", "accelerate": "1.13"}

# The methods of Trainer that are extended or replaced, in its order, with the parameters that are relied on. Before transformers
# 5.3 training was one method, without a place between its steps.
HOOKS = {
    "create_accelerator_and_postprocess": (),
    "_move_model_to_device": ("model", "device"),
    "add_callback": ("callback",),
    "train": ("resume_from_checkpoint",),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
    "_issue_warnings_after_load": ("load_result",),
    "_inner_training_loop": (),
    "get_train_dataloader": (),
    "set_initial_training_values": ("args", "dataloader"),
    "get_total_train_batch_size": ("args",),
    "_init_training_state": ("max_steps", "num_train_epochs", "resume_from_checkpoint", "trial"),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "create_optimizer": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_run_epoch": ("epoch", "train_dataloader", "steps_trained_in_current_epoch"),
    "_load_rng_state": ("checkpoint",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs"),
    "floating_point_ops": ("inputs",),
    "_track_num_input_tokens": ("inputs",),
    "_clip_grad_norm": ("model",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_maybe_log_save_evaluate": ("tr_loss", "grad_norm", "model", "trial"),
    "log": ("logs",),
    "_evaluate": (),
    "evaluate": ("eval_dataset",),
    "predict": ("test_dataset",),
    "_save_checkpoint": ("model", "trial"),
    "save_model": ("output_dir", "_internal_call"),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_finalize_training": (),
    "_load_best_model": (),
    "init_hf_repo": (),
    "create_model_card": (),
}


def check_versions() -> None:
    """Raise ImportError for packages that are older than what is needed, with the versions that work."""
    for name, (lowest, newest) in TESTED.items():
        if Version(version(name)) < Version(lowest):
            raise ImportError(
                f"hf_sampa needs {name} {lowest} or newer (tested: {lowest} to {newest}), but {version(name)} is installed: "
                f"pip install --upgrade '{name}>={lowest}'."
            )


def check_hooks(trainer_class: type[Trainer]) -> None:
    """Raise ImportError for a Trainer that lacks what `HOOKS` has: of a version to come, in which it was renamed."""

    def has(name: str, parameters: tuple[str, ...]) -> bool:
        method = getattr(trainer_class, name, None)
        return method is not None and set(parameters) <= inspect.signature(method).parameters.keys()

    if lacking := [name for name, parameters in HOOKS.items() if not has(name, parameters)]:
        lowest, newest = TESTED["transformers"]
        raise ImportError(
            f"hf_sampa works within Trainer's {', '.join(lacking)}, which transformers {version('transformers')} does not have, or not "
            f"in this form (tested: {lowest} to {newest}): pip install 'transformers=={newest}'."
        )


def check_shards() -> None:
    """Raise ImportError where FSDP2 is asked for with versions below `SHARDS`."""
    if older := [f"{name} {version(name)}" for name, first in SHARDS.items() if before(name, first)]:
        wanted = ", ".join(f"{name} {first}" for name, first in SHARDS.items())
        raise ImportError(
            f"FSDP2: expected {wanted} or newer, found {', '.join(older)}. Upgrade, or train without FSDP, which older ones do, too."
        )


@cache
def say_what_is_untested() -> None:
    """One warning, on the main process, where something is newer than what the tests were run with."""
    newer = [name for name, (_, newest) in TESTED.items() if _minor(version(name)) > _minor(newest)]
    if newer:
        logger.warning(
            f"{', '.join(f'{name} {version(name)}' for name in newer)}: newer than what this hf_sampa was tested with "
            f"({', '.join(f'{name} {TESTED[name].newest}' for name in newer)}). If something looks wrong, try that first."
        )


def _minor(version: str) -> tuple[int, ...]:
    """2.15.1+cu130 as 2.15: releases of fixes, and builds, are no news."""
    return Version(version).release[:2]


@cache  # asked in every pass, and looked up on the disk
def before(name: str, first: str) -> bool:
    """Whether the package `name` is older than its version `first`."""
    return Version(version(name)) < Version(first)


# ---- transformers ----


def take_loss_for_mean(trainer: Trainer) -> None:
    """Tell `trainer` that its losses are means over their batches, to be divided by the accumulation steps, whatever its model accepts.

    Some models accept `num_items_in_batch` and return a mean all the same (transformers #47688).
    """
    if before("transformers", "5.19"):
        trainer.model_accepts_loss_kwargs = False
    else:
        trainer.loss_is_scaled_for_ga = False


def checkpointing_argument() -> str:
    """The training argument that lets layers be computed again in backward."""
    return "gradient_checkpointing" if before("transformers", "5.23") else "activation_checkpointing"


@contextmanager
def divided_by(trainer: Trainer, divisor: float) -> Iterator[None]:
    """Have ``training_step`` divide what ``compute_loss`` returns by `divisor`, whatever it is the mean of."""
    trainer.current_gradient_accumulation_steps = divisor
    with _never_scaled(trainer):
        yield


@contextmanager
def _never_scaled(trainer: Trainer) -> Iterator[None]:
    """Before transformers 5.19 ``training_step`` goes by two attributes that ``compute_loss`` goes by, too: it gets them back."""
    if not before("transformers", "5.19"):
        with _set(trainer, loss_is_scaled_for_ga=False):
            yield
        return
    accepts, func, own = trainer.model_accepts_loss_kwargs, trainer.compute_loss_func, trainer.compute_loss

    def compute_loss(*args, **kwargs):
        with _set(trainer, model_accepts_loss_kwargs=accepts, compute_loss_func=func):
            return own(*args, **kwargs)

    with _set(trainer, model_accepts_loss_kwargs=False, compute_loss_func=None, compute_loss=compute_loss):
        yield


@contextmanager
def _set(owner: object, **values: Any) -> Iterator[None]:
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)
        vars(owner).update(before)


def let_trainer_divide(trainer: Trainer) -> None:
    """Before transformers 5.5.4 accelerate divides losses by the accumulation steps once more, after Trainer did."""
    trainer.accelerator.gradient_accumulation_steps = 1


def count_every_label(trainer: Trainer) -> None:
    """Before transformers 5.15, from 5.10 on, labels of encoder-decoder models are counted as if the first had no part in the loss."""
    config = getattr(trainer.model, "config", None)
    if before("transformers", "5.15") and getattr(config, "is_encoder_decoder", False):
        trainer._loss_shifts_labels = False


def keeps_best_step() -> bool:
    """Before transformers 5.4 ``save_strategy="best"`` keeps no note of which checkpoint is the best, and loads none at the end."""
    return not before("transformers", "5.4")


def one_process_saves(trainer: Trainer) -> bool:
    """Before transformers 5.23 ``save_model`` calls ``_save`` on the main process only, where the others have to gather with it. From
    5.20 on it did not for models that were sharded when they were loaded."""
    return before("transformers", "5.23") and not getattr(trainer, "is_distributed_loading_by_transformers", False)


def without_cpu_index(device: torch.device) -> torch.device:
    """Before transformers 5.18 optimizers are loaded onto the device as it is called, and torch knows no "cpu:0" there."""
    return torch.device("cpu") if device.type == "cpu" else device


def pillow_vit_processor(transformers: Any) -> type:
    """ViT's image processor on Pillow, of the package `transformers`. Before 5.4 it has another name."""
    return transformers.ViTImageProcessor if before("transformers", "5.4") else transformers.ViTImageProcessorPil


def on_pillow() -> dict[str, Any]:
    """What ``AutoImageProcessor.from_pretrained`` is told. Before transformers 5.4 "fast" is torchvision and not Pillow."""
    return {"use_fast": False} if before("transformers", "5.4") else {"backend": "pil"}


# ---- torch and numpy ----


def numpy_by_both_names():
    """Within the block torch loads numpy's arrays from files that were written with numpy 1 and with numpy 2, which name them differently."""
    reconstruct, *_ = np.empty(0).__reduce__()
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return torch.serialization.safe_globals([(reconstruct, name) for name in names])


def adam_step(*args, decoupled_weight_decay: bool, **kwargs) -> None:
    """`torch.optim.adam.adam`. Before torch 2.7 AdamW is a function of its own."""
    if ADAM_DECOUPLES:
        adam(*args, decoupled_weight_decay=decoupled_weight_decay, **kwargs)
    else:
        (adamw if decoupled_weight_decay else adam)(*args, **kwargs)


def let_threads_go() -> None:
    """Before a process group is destroyed. torch 2.6 waits for the group's threads and holds Python's lock meanwhile, which they may need
    to let go of their last tensors: they have it before that. 2.9 was not seen to hang."""
    if before("torch", "2.9"):
        time.sleep(0.05)


ADAM_DECOUPLES = "decoupled_weight_decay" in inspect.signature(adam).parameters

check_versions()
