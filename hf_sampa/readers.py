"""Who may read the model between two steps: whoever does needs all of x_t, where a process holds a part.

A callback that does not read it says ``reads_model = False``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from torch.optim import optimizer as torch_optimizer


if TYPE_CHECKING:
    from .trainer import SAMPaMixin

# transformers' callbacks log, and look at the model where the run is saved or evaluated, or ends; this package's ask for it.
KNOWN = ("transformers.", "hf_sampa.")
# What a trainer of one's own may override: called before the run, or within a pass, where the weights are displaced anyway, or
# within an evaluation or a save.
ELSEWHERE = frozenset(
    {
        *("compute_loss", "training_step", "compute_loss_context_manager", "autocast_smart_context_manager"),
        *("_prepare_inputs", "_prepare_input"),
        *("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "num_examples"),
        *("_get_train_sampler", "_get_eval_sampler", "_set_signature_columns_if_needed", "_remove_unused_columns"),
        *("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler", "get_decay_parameter_names"),
        *("get_optimizer_cls_and_kwargs", "create_accelerator_and_postprocess", "create_model_card", "train"),
        *("evaluate", "predict", "evaluation_loop", "prediction_step", "save_model", "_save", "_save_checkpoint"),
    }
)


def reader_of(trainer: SAMPaMixin) -> str | None:
    """The first that may read the model between two steps, in words; None where nothing does."""
    return next(_readers(trainer), None)


def _readers(trainer: SAMPaMixin) -> Iterator[str]:
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "reads_model", not _is_known(type(callback))):
            yield f"the callback {type(callback).__name__}"
    for one in (trainer, trainer.callback_handler, *trainer.callback_handler.callbacks):
        yield from _put_in(one)
    yield from _methods(type(trainer))
    if trainer.args.auto_find_batch_size:
        yield "auto_find_batch_size, which begins anew"
    optimizer = trainer.optimizer.optimizer
    several = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    for hooks in (*several, torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks):
        for hook in hooks.values():
            if not _is_known(hook):
                yield "a hook of the optimizer"


def _put_in(one: Any) -> Iterator[str]:
    """Methods that `one` has in the place of its class's."""
    for name, value in vars(one).items():
        if name not in ELSEWHERE and callable(value) and callable(getattr(type(one), name, None)):
            if not _is_known(getattr(value, "func", value)):  # of a partial
                yield f"{type(one).__name__}.{name}"


@cache
def _methods(trainer: type) -> tuple[str, ...]:
    """Those of a trainer's class that are called between steps, and are neither Trainer's nor this package's."""
    found = []
    for kind in trainer.__mro__:
        if kind is not object and not _is_known(kind):
            own = [name for name, value in vars(kind).items() if _runs(value) and not name.startswith("__")]
            found += [f"{kind.__name__}.{name}" for name in own if name not in ELSEWHERE]
    return tuple(found)


def _runs(value: Any) -> bool:
    return callable(value) or isinstance(value, property)


def _is_known(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith(KNOWN)
