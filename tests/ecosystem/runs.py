"""A case, a trainer of another library and what it is given, and the runs that its tests compare."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import tiny
from tests.ecosystem import models


# An epoch is four batches, the last of them short. The checkpoint that a run is resumed from lies within an epoch, and
# between two log lines.
SAMPLES = 14
STEPS, SAVED_AT, LOGGED_AT = 6, 3, 2
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": LOGGED_AT,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "optim": "adamw_torch",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    # Where processes wait for one another in vain, the test is to end soon.
    "ddp_timeout": 20,
}
# The first checkpoint is the best, as `Watch` has it, so that what is held at the end was not held before.
SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "eval_strategy": "steps",
    "eval_steps": SAVED_AT,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_earliness",
    "greater_is_better": True,
}


@dataclass(frozen=True)
class Case:
    """A trainer under the mixin, and what it is tried with.

    Attributes:
        trainer: of another library, with SAMPaMixin above it.
        arguments: its arguments, with SAMPaArgumentsMixin.
        plain: the library's trainer and arguments themselves.
        model: name of a model in `models.MAKERS`.
        load: the library's own way to load a model from a folder.
        inputs: what else the trainer is given, of its model, the folder of all models and a number of samples.
        outputs: what a loaded model says of a fixed input.
        settings: arguments that differ from `SETTINGS`.
        title: how the table of what was tried calls it, behind the trainer's name.
        saved: its way to load what the trainer saved, where that is another one.
        evaluates_alike: whether the loss on the evaluation data is the same on one process and on two, to rounding.
        positional: names of the arguments that are passed by position.
        limits: what is known not to hold, by the names in `properties.PROPERTIES`, and why.
        whole: whether it is for ``make test-all`` alone, as other cases of the trainer show as much.
    """

    title: str
    trainer: type[Trainer]
    arguments: type[TrainingArguments]
    plain: tuple[type[Trainer], type[TrainingArguments]]
    model: str
    load: Callable[[str], nn.Module]
    inputs: Callable[[nn.Module, Path, int], dict[str, Any]]
    outputs: Callable[[nn.Module], Tensor]
    saved: Callable[[str], nn.Module] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    evaluates_alike: bool = True
    positional: tuple[str, ...] = ()
    limits: dict[str, str] = field(default_factory=dict)
    whole: bool = False

    @property
    def name(self) -> str:
        """Of its tests."""
        return f"{self.plain[0].__name__}, {self.title}"

    def alone(self, folder: Path | str) -> nn.Module:
        """The model saved in `folder`, loaded without hf_sampa."""
        return (self.saved or self.load)(str(folder)).eval()


class Watch(TrainerCallback):
    """Keeps what was trained, as it was after the last step, and finds every evaluation worse than the one before."""

    trainer: Trainer
    weights: dict[str, Tensor]

    def on_step_end(self, args, state, control, **kwargs):
        self.weights = trained(self.trainer)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_earliness"] = -state.global_step


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """The model's weights and buffers, and those of its loss, where that has some."""
    loss = getattr(trainer, "loss", {})
    losses = loss if isinstance(loss, dict) else {"loss": loss}
    own = {name: value for key, each in losses.items() for name, value in each.state_dict(prefix=f"{key}.").items()}
    return {name: value.clone() for name, value in {**trainer.model.state_dict(), **own}.items()}


def make(
    case: Case, start: Path, out: Path, *, plain: bool = False, dropout: bool = True, samples: int = SAMPLES, **changes
) -> Trainer:
    """The trainer of `case`, or the library's own, over a model from the folder `start`; it writes into `out`."""
    os.environ.setdefault("CI", "true")  # without it TRL reports over the network that it is used
    gc.freeze()  # every run begins with a collection, which would look at all that the libraries have made
    model = case.load(models.path(start, case.model, dropout))
    trainer_class, arguments = case.plain if plain else (case.trainer, case.arguments)
    settings = {**SETTINGS, **changes, **case.settings}
    if plain:
        settings = {name: value for name, value in settings.items() if name in arguments.__dataclass_fields__}
    args = arguments(str(out), **settings)
    watch = Watch()
    torch.manual_seed(0)  # for adapters, which some versions make before the trainer has set its seed
    kwargs = {"model": model, "args": args, "callbacks": [watch], **case.inputs(model, start, samples)}
    positional = [kwargs.pop(name) for name in case.positional]
    watch.trainer = trainer_class(*positional, **kwargs)
    return watch.trainer


def outcome(trainer: Trainer, resume_from_checkpoint: Path | None = None) -> dict[str, Any]:
    """Train, and return what two equal runs must have in common."""
    found = tiny.comparable(tiny.outcome(trainer, resume_from_checkpoint and str(resume_from_checkpoint)))
    watch = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Watch))
    lines = {"training": [], "evaluation": []}
    for line in found["logs"]:
        lines["evaluation" if any(name.startswith("eval_") for name in line) else "training"].append(line)
    return {**found, "logs": None, **lines, "held": found["weights"], "weights": watch.weights}


def on_two(case: Case, start: Path, folder: Path) -> dict[str, Any]:
    """On each of two processes: a run left alone, what it saved, and the run resumed from its first checkpoint."""
    trainer = make(case, start, folder / "whole", **SAVING)
    whole = outcome(trainer)
    trainer.save_model(folder / "saved")
    resumed = outcome(make(case, start, folder / "again", **SAVING), first_checkpoint(folder))
    found = {"whole": whole, "resumed": resumed, "best": trainer.state.best_model_checkpoint}
    if trainer.is_world_process_zero():
        # Without what accelerate has put around forward for bf16.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        best, saved = case.alone(found["best"]), case.alone(folder / "saved")
        with torch.no_grad():
            found["outputs"] = [case.outputs(model), case.outputs(saved)]
        found["loaded"] = {"best": dict(best.state_dict()), "saved": dict(saved.state_dict())}
    return found


def on_one(case: Case, start: Path, folder: Path, written: Path) -> dict[str, Any]:
    """On one process: the same run left alone, and resumed from what two processes wrote into `written`.

    And without perturbation, look-ahead and dropout, beside the library's own trainer.
    """
    whole = outcome(make(case, start, folder / "whole", **SAVING))
    settings = {"dropout": False, "samples": 16, "logging_steps": 1}  # batches of one size, so that they count alike
    flat = outcome(make(case, start, folder / "flat", **settings, rho=0.0, lmbda=0.0))
    plain = outcome(make(case, start, folder / "plain", **settings, plain=True))
    found = {"whole": whole, "flat": flat, "plain": plain}
    if first_checkpoint(written).exists():
        found["crossed"] = outcome(make(case, start, folder / "crossed", **SAVING), first_checkpoint(written))
    return found


def first_checkpoint(folder: Path) -> Path:
    """What the run left alone wrote first into `folder`."""
    return folder / "whole" / f"checkpoint-{SAVED_AT}"
