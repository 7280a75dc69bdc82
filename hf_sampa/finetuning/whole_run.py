"""A whole run, as its arguments ask for it: train, score, predict, save, publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from ..cards import CardFacts
from ..trainer import SAMPaMixin


def train_and_score(
    trainer: Trainer,
    *,
    test_dataset: Any = None,
    write_predictions: Callable[..., None] | None = None,
    **card: str | list[str] | None,
) -> dict[str, float]:
    """Do what the trainer's `FineTuningArguments` ask for: train and save, score, predict, publish. Writes a model card.

    Args:
        trainer: SAMPa's or a plain one. It needs training data for `do_train` and evaluation data for `do_eval` only.
        test_dataset: for `do_predict`: one data set, or several by name.
        write_predictions: for `do_predict`: called on the main process with the `PredictionOutput` and the output folder, for
            each of several data sets with its name after them.
        card: what the model card is to say, by the names of `CardFacts`.

    Returns:
        The metrics on the evaluation data, and on test data that have labels (``test_...``, ``test_<name>_...``).
    """
    args = trainer.args
    facts = CardFacts(**card)
    if isinstance(trainer, SAMPaMixin):
        trainer.card_facts, card = facts, {}  # for the cards of checkpoints, too
    else:
        card = {name: fact for name, fact in facts.for_trainer().items() if fact is not None}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate() if args.do_eval else {}
    if args.do_eval:
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_predict:
        metrics = metrics | _predict(trainer, test_dataset, write_predictions)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    elif args.do_train:
        trainer.create_model_card(**card)
    return metrics


def _predict(trainer: Trainer, test_dataset: Any, write: Callable[..., None] | None) -> dict[str, float]:
    """Predict every data set, and hand what came out to `write`; returns the metrics."""
    several = test_dataset if isinstance(test_dataset, dict) else {"": test_dataset}
    metrics: dict[str, float] = {}
    for name, dataset in several.items():
        output: PredictionOutput = trainer.predict(dataset, metric_key_prefix=f"test_{name}" if name else "test")
        metrics |= output.metrics
        if write is not None and trainer.is_world_process_zero():
            write(output, Path(trainer.args.output_dir), *([name] if name else []))
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)
    return metrics
