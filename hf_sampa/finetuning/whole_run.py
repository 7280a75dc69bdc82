"""A whole run, as its arguments ask for it: train, score, predict, save, publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import PredictionOutput, has_length

from ..cards import CardFacts
from ..trainer import SAMPaMixin
from . import learning_curve, output_folder
from .baseline import BaselineTrainer


def train_and_score(
    trainer: SAMPaMixin | BaselineTrainer,
    *,
    test_dataset: Any = None,
    write_predictions: Callable[..., None] | None = None,
    **card: str | list[str] | None,
) -> dict[str, float]:
    """Do what the trainer's `FineTuningArguments` ask for: train and save, score, predict, publish. Writes a model card.

    Args:
        trainer: SAMPa's, or for ``--method adamw`` the baseline's. It needs training data for `do_train` only, and evaluation
            data for `do_eval`.
        test_dataset: for `do_predict`: one data set, or several by name.
        write_predictions: for `do_predict`: called on the main process with the `PredictionOutput` and the output folder, for
            each of several data sets with its name after them.
        card: what the model card is to say, by the names of `CardFacts`.

    The folder of the run also gets a picture of its loss and metrics, ``learning_curve.png``.

    Returns:
        The metrics on the evaluation data, and on test data that have labels (``test_...``, ``test_<name>_...``).

    Raises:
        ValueError: ``resume_from_checkpoint=True`` would go on from another run than this, or there is none.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    trainer.card_facts = CardFacts(**card)  # for the cards of checkpoints, too
    metrics: dict[str, float] = {}
    if args.do_train:
        _begin(trainer, folder)
        _train(trainer, folder)
    if args.do_eval:
        metrics = trainer.evaluate() | _samples("eval", trainer.eval_dataset)
        _keep(trainer, "eval", metrics)
    if args.do_predict:
        metrics = metrics | _predict(trainer, test_dataset, write_predictions)
    if args.push_to_hub:
        trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    return metrics


def _begin(trainer: SAMPaMixin | BaselineTrainer, folder: Path) -> None:
    """Make room for the run, or see that the one which is there is the one to be continued."""
    args, config = trainer.args, trainer.model.config
    model = Path(config._name_or_path).name or config.model_type
    run = {"method": args.method, "data set": trainer.card_facts.dataset, "model": model}
    if args.resume_from_checkpoint is True:
        output_folder.check_own(folder, run)
    elif trainer.is_world_process_zero():
        if args.overwrite_output_dir:
            output_folder.move_aside(folder, args.resume_from_checkpoint)
        output_folder.begin(folder, run)


def _train(trainer: SAMPaMixin | BaselineTrainer, folder: Path) -> None:
    args = trainer.args
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    _keep(trainer, "train", result.metrics | _samples("train", trainer.train_dataset))
    if trainer.is_world_process_zero():
        learning_curve.draw(trainer.state.log_history, folder)


def _samples(split: str, data: Any) -> dict[str, int]:
    """How many there are, of each data set where there are several by name; nothing for a stream."""
    several = {f"{split}_{name}": each for name, each in data.items()} if isinstance(data, dict) else {split: data}
    return {f"{name}_samples": len(each) for name, each in several.items() if has_length(each)}


def _keep(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def _predict(trainer: Trainer, test_dataset: Any, write: Callable[..., None] | None) -> dict[str, float]:
    """Predict every data set, and hand what came out to `write`; returns the metrics."""
    several = test_dataset if isinstance(test_dataset, dict) else {"": test_dataset}
    metrics: dict[str, float] = {}
    for name, dataset in several.items():
        output: PredictionOutput = trainer.predict(dataset, metric_key_prefix=f"test_{name}" if name else "test")
        metrics |= output.metrics | _samples(f"test_{name}" if name else "test", dataset)
        if write is not None and trainer.is_world_process_zero():
            write(output, Path(trainer.args.output_dir), *([name] if name else []))
    _keep(trainer, "test", metrics)
    return metrics
