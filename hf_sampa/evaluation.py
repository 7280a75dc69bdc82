"""The evaluation loss on several processes: the mean over the samples, each counted once.

Every process evaluates as many samples, so that accelerate fills up the last batch with samples from the beginning. Upstream
takes these out of the predictions, but not out of the loss, which is one number per process and batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from accelerate.logging import get_logger
from transformers.trainer_pt_utils import find_batch_size

from .distributed import Alone, alone, units
from .state import Collected


logger = get_logger(__name__)


class ExactEvalLoss:
    """Put it above a `Trainer`: its `eval_loss` on any number of processes weighs every sample once, `predict`'s, too.

    Where nobody knows how many samples the last batch has, a warning says so: upstream's loss is left as it is there.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        """Upstream's loss of the last batch is also one of samples that fill it up: it is taken once more, without them."""
        last, step = _last_batch(self.accelerator), super().prediction_step
        if last is None:
            _warn_of_other_weights(self, inputs)
        left, size = last or (0, 0)
        count = min(max(left - self.accelerator.process_index * size, 0), size)
        real = None if last is None else _first(inputs, count, size)
        loss, *rest = step(model, inputs, prediction_loss_only, *args, **kwargs)
        if last is not None and loss is not None and loss.dim() == 0:
            exact = real is not None
            # A forward pass of a sharded model is one of all processes that hold it.
            together = bool(units(model)) and left % size > 0
            if together or (exact and real is not inputs):
                try:
                    with _uncounted(self, together):
                        loss, *_ = step(model, real if exact else inputs, True, *args, **kwargs)
                except Alone:
                    exact = False
            loss = _mean(self.accelerator, loss, count, exact)
        return loss, *rest


def _last_batch(accelerator: Accelerator) -> tuple[int, int] | None:
    """In the last batch of all processes, how many samples there are for them, and how many each is given; else None."""
    state, world = accelerator.gradient_state, accelerator.num_processes
    if world == 1 or not state.end_of_dataloader:
        return None
    loader, left = state.active_dataloader, state.remainder
    if left < 0 and isinstance(loader.dataset, IterableDatasetShard) and not loader.drop_last:
        logger.warning_once(
            "eval_loss and metrics may count some samples twice: the data have no length, and every process reads them by itself, "
            "so that nobody knows how many fill up the last batch. Leave out dispatch_batches=False, or give data of a known length."
        )
    if left <= 0:
        return None
    # What a dispatcher has left it deals out evenly; others give each process a batch, as long as there are any.
    return left, -(-left // world) if isinstance(loader, DataLoaderDispatcher) else loader.total_batch_size // world


def _warn_of_other_weights(trainer: Any, inputs: Any) -> None:
    """Say where upstream takes the loss of a batch for one of ``eval_batch_size`` samples, and it is not."""
    state, world = trainer.accelerator.gradient_state, trainer.accelerator.num_processes
    if world > 1 and trainer.accelerator.split_batches:
        logger.warning_once(
            "eval_loss weighs the last batch less than the others: with split_batches=True a process has a part of a batch, and "
            "its loss counts as that of a whole one. Leave split_batches out, or evaluate on one process for the exact mean."
        )
        return
    known = state.active_dataloader is not None and state.end_of_dataloader and state.remainder >= 0
    if not known and (find_batch_size(inputs) or trainer.args.eval_batch_size) < trainer.args.eval_batch_size:
        logger.warning_once(
            "eval_loss may weigh a short batch as a whole one: its loader is not accelerate's, or has no length, so that nobody "
            "knows how many samples the last batch has. Return self.accelerator.prepare(loader), or give data of a known length."
        )


def _first(inputs: Any, count: int, size: int) -> Any:
    """The first `count` samples of a batch of `size`; None where that is not how it is put together."""
    if count in (0, size):
        return inputs
    if not isinstance(inputs, Mapping):
        return None
    several = {name: value for name, value in inputs.items() if isinstance(value, list | tuple | Mapping)}
    several |= {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim()}
    cut = {name: _first_of(value, count, size) for name, value in several.items()}
    return None if not cut or any(value is None for value in cut.values()) else {**inputs, **cut}


def _first_of(value: Any, count: int, size: int) -> Any:
    if isinstance(value, Mapping):
        return _first(value, count, size)
    return value[:count] if len(value) == size else None


@contextmanager
def _uncounted(trainer: Any, together: bool) -> Iterator[None]:
    """Around a loss that this process alone takes, unless all do: nothing waits for others, and the trainer's own figures stay."""
    with (
        nullcontext() if together else alone(),
        Collected(trainer, ("transformers.", "hf_sampa."), exchange=None).aside(),
    ):
        yield


def _mean(accelerator: Accelerator, loss: torch.Tensor, count: int, exact: bool) -> torch.Tensor:
    """The mean loss over the samples of all processes, of which this one has `count`."""
    total = loss.float() * count if count else torch.zeros((), device=loss.device)
    mine = torch.stack([total, total.new_tensor(count), total.new_tensor(not exact)])
    totals, counts, inexact = accelerator.gather(mine[None]).unbind(1)
    if inexact.any():
        logger.warning_once(
            "eval_loss counts some samples twice: the data do not divide evenly among the processes, and of a batch whose values "
            "are not one per sample, or of a loss that asks other processes, the part is not known that belongs to those which fill "
            "it up. Evaluate on one process for the exact mean."
        )
    return (totals.sum() / counts.sum()).to(loss.dtype)
