"""An exponential moving average of the weights: kept while a run trains, and what it is evaluated by, saved at the end as, and scored with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from ..checkpoints import WEIGHT_AVERAGE
from ..distributed import units
from ..files import in_place_of
from ..state import holding, stood_in
from ..trainer import SAMPaMixin
from .baseline import BaselineTrainer


# How many updates an average is over, beside the weights in its file. No parameter's name begins with a dot.
UPDATES = ".updates"


def check_averaged(trainer: SAMPaMixin | BaselineTrainer) -> None:
    """Raise ValueError where there can be no average of the weights."""
    if trainer.args.ema_decay is not None and (trainer.is_fsdp_enabled or units(trainer.model)):
        raise ValueError(
            "--ema_decay: expected weights that every process holds whole, got a model that FSDP shards. Leave out --ema_decay or FSDP."
        )


class WeightAverageCallback(TrainerCallback):
    """Averages the model's trained weights after every update: a_1 = x_1, a_t = D a_{t-1} + (1 - D) x_t.

    There is no bias correction beyond that start. Every process has the same x_t, and so the same average, of one number per
    trained weight. Buffers are not averaged: with a_t the model has those of x_t. At the end of the training the model is given the
    average, that of the best step where its weights were loaded.

    Args:
        trainer: whose model it is.
        decay: D, above 0 and below 1.
    """

    # With a shared optimizer, all of x_t is needed after every step.
    reads_model = True

    def __init__(self, trainer: SAMPaMixin | BaselineTrainer, decay: float):
        self.trainer, self.decay = trainer, decay
        self.resumed: str | None = None  # the checkpoint that the run goes on from
        self._weights, self._average, self._names = nn.ParameterList(), None, []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Around ``train()``: evaluations within are of the average, and checkpoints have it beside the trained weights."""
        trainer = self.trainer
        load, save, evaluate = trainer._load_from_checkpoint, trainer.save_model, trainer.evaluate

        def load_from_checkpoint(folder: str, *args: Any, **kwargs: Any) -> None:
            self.resumed = folder
            load(folder, *args, **kwargs)

        def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
            save(output_dir, _internal_call)
            if _internal_call and trainer.args.should_save:
                trainer._attempt("the average of the weights", lambda: self._save(Path(output_dir)))

        def evaluate_average(*args: Any, **kwargs: Any) -> dict[str, float]:
            with holding(self._weights, self._averaged()):
                return evaluate(*args, **kwargs)

        # First: what others do at the end of the training is of the average.
        trainer.callback_handler.callbacks.insert(0, self)
        try:
            with (
                stood_in(trainer, "_load_from_checkpoint", load_from_checkpoint),
                stood_in(trainer, "save_model", save_model),
                stood_in(trainer, "evaluate", evaluate_average),
            ):
                yield
        finally:
            trainer.remove_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        named = {name: param for name, param in self.trainer.model.named_parameters() if param.requires_grad}
        self._names, self._weights = [*named], nn.ParameterList(named.values())
        self._average = AveragedModel(self._weights, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.resumed is not None:
            self._load(Path(self.resumed))

    def on_step_end(self, args, state, control, **kwargs):
        self._average.update_parameters(self._weights)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.weights_step != state.global_step:
            self._load(Path(state.best_model_checkpoint))
        torch._foreach_copy_([param.data for param in self._weights], self._averaged())

    def _averaged(self) -> list[Tensor]:
        return [param.data for param in self._average.module]

    def _save(self, folder: Path) -> None:
        tensors = dict(zip(self._names, (each.contiguous() for each in self._averaged()), strict=True))
        with in_place_of(folder / WEIGHT_AVERAGE) as partial:
            save_file({**tensors, UPDATES: self._average.n_averaged}, partial)

    def _load(self, folder: Path) -> None:
        """Take up the average in a checkpoint. Raises ValueError where it has none, or that of another model."""
        if not (folder / WEIGHT_AVERAGE).is_file():
            raise ValueError(
                f"--ema_decay {self.decay:g}: expected the checkpoint of a run with an average, got {folder}, which has no "
                f"{WEIGHT_AVERAGE}. Leave --ema_decay out, or start a new run."
            )
        found = load_file(folder / WEIGHT_AVERAGE)
        expected = {UPDATES: torch.Size(()), **dict(zip(self._names, map(Tensor.size, self._weights), strict=True))}
        if {name: each.shape for name, each in found.items()} != expected:
            raise ValueError(
                f"--ema_decay {self.decay:g}: expected in {folder / WEIGHT_AVERAGE} the weights that are trained, got others. Resume "
                "with the model that wrote it, or start a new run."
            )
        self._average.n_averaged.copy_(found[UPDATES])
        torch._foreach_copy_(self._averaged(), [found[name] for name in self._names])
