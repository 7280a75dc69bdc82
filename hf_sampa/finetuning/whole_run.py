"""A whole run, as its arguments ask for it: train, score, predict, save, publish."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput, has_length

from ..cards import CardFacts
from ..trainer import SAMPaMixin
from . import learning_curve, output_folder
from .baseline import BaselineTrainer
from .early_stopping import EarlyStoppingCallback
from .step_times import StepTimes
from .training_arguments import FineTuningArguments
from .weight_average import WeightAverageCallback, check_averaged


# By which a split is asked for.
OPTIONS = {"train": "do_train", "eval": "do_eval", "test": "do_predict"}


def train_and_score(
    trainer: SAMPaMixin | BaselineTrainer,
    *,
    scores: Collection[str],
    test_dataset: Any = None,
    write_predictions: Callable[..., None] | None = None,
    prediction_files: Collection[str] = ("predictions.csv",),
    **card: str | list[str] | None,
) -> dict[str, float]:
    """Do what the trainer's `FineTuningArguments` ask for: train and save, score, predict, publish. Writes a model card.

    Args:
        trainer: SAMPa's, or for ``--method adamw`` the baseline's. It needs training data for `do_train` only, and evaluation
            data for `do_eval`.
        scores: names that its `compute_metrics` gives, of which `metric_for_best_model` is one, or the loss.
        test_dataset: for `do_predict`: one data set, or several by name.
        write_predictions: for `do_predict`: called on the main process with the `PredictionOutput` and the output folder, for
            each of several data sets with its name after them.
        prediction_files: what `write_predictions` writes into that folder, by name.
        card: what the model card is to say, by the names of `CardFacts`.

    The folder of the run also gets a picture of its loss and metrics, ``learning_curve.png``. Results and predictions that are
    there already, whoever wrote them, are moved into a folder inside, ``_replaced-1``, before they are written anew.

    Returns:
        The metrics on the evaluation data, and on test data that have labels (``test_...``, ``test_<name>_...``).

    Raises:
        ValueError: no evaluation has the score that `metric_for_best_model` names; FSDP shards a model that is to have an average; or
            `resume_from_checkpoint` would go on from another run than this, or in its folder, or there is none.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    trainer.card_facts = CardFacts(**card)  # for the cards of checkpoints, too
    metrics: dict[str, float] = {}
    _check_best(trainer, scores)
    check_averaged(trainer)
    _open(trainer, folder, prediction_files)
    if args.do_train:
        _train(trainer, folder)
    if args.do_eval:
        metrics = _found(trainer.evaluate()) | _samples("eval", trainer.eval_dataset)
        _keep(trainer, "eval", metrics)
    if args.do_predict:
        metrics = metrics | _predict(trainer, test_dataset, write_predictions)
    if args.push_to_hub:
        with _noted(trainer):
            trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    return metrics


def _check_best(trainer: SAMPaMixin | BaselineTrainer, scores: Collection[str]) -> None:
    """Raise ValueError where no evaluation has what `metric_for_best_model` names: upstream looks for it after the first one."""
    args = trainer.args
    if not (args.do_train and args.do_eval) or args.metric_for_best_model is None:
        return
    data = trainer.eval_dataset
    of_each = ("loss", *scores)
    known = [f"{name}_{score}" for name in data for score in of_each] if isinstance(data, dict) else list(of_each)
    given = args.metric_for_best_model.removeprefix("eval_")
    if given not in known:
        raise ValueError(
            f"--metric_for_best_model: expected what an evaluation of this run finds, {', '.join(known)}, got {given}. Give one of "
            "these."
        )


def _open(trainer: SAMPaMixin | BaselineTrainer, folder: Path, prediction_files: Collection[str]) -> None:
    """Make room for the run, or see that the one which is there is the one to be continued."""
    args = trainer.args
    main = trainer.is_world_process_zero()
    # What the main process moves, the others are not to look for meanwhile.
    with args.main_process_first(local=False, desc="opening the output folder"):
        if main:
            output_folder.open_again(folder)
        if args.do_train:
            _check_continued(args, folder, _run(trainer))
    if not main:
        return
    if args.do_train and args.overwrite_output_dir:
        output_folder.begin_anew(folder, _run(trainer), args.resume_from_checkpoint)
    elif args.do_train:
        output_folder.begin(folder, _run(trainer))
    splits = [split for split in output_folder.SPLITS if getattr(args, OPTIONS[split])]
    output_folder.make_way(folder, splits, prediction_files if args.do_predict else ())


def _run(trainer: SAMPaMixin | BaselineTrainer) -> dict[str, Any]:
    """Which run it is, as far as another one may not go on with it."""
    config = trainer.model.config
    model = Path(config._name_or_path).name or config.model_type
    return {
        "method": trainer.args.method,
        "data set": trainer.card_facts.dataset,
        "model": model,
        "ema_decay": trainer.args.ema_decay or "none",
    }


def _check_continued(args: FineTuningArguments, folder: Path, run: dict[str, Any]) -> None:
    """Raise ValueError where another run would be continued, or none."""
    given = args.resume_from_checkpoint
    if given is True:
        output_folder.check_has_checkpoint(folder)
        way_out = "Choose the --output_dir of this run, or start anew with --overwrite_output_dir in the place of this option."
        output_folder.check_own(folder, run, "true", way_out)
    elif given:
        way_out = f"Name a checkpoint of this run, or begin a new one with its weights: --model_name_or_path {given} in the place of this option, and an --output_dir of its own."
        output_folder.check_own(Path(given).absolute().parent, run, given, way_out)
        if not args.overwrite_output_dir:
            way_out = "Choose another --output_dir, or add --overwrite_output_dir."
            output_folder.check_own(folder, run, given, way_out)


def _train(trainer: SAMPaMixin | BaselineTrainer, folder: Path) -> None:
    args = trainer.args
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    trainer.add_callback(times := StepTimes())
    averaged = nullcontext() if args.ema_decay is None else WeightAverageCallback(trainer, args.ema_decay).used()
    with averaged:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    with _noted(trainer):
        trainer.save_model()
    trainer.save_state()
    _keep(trainer, "train", result.metrics | times.metrics() | _samples("train", trainer.train_dataset))
    if trainer.is_world_process_zero():
        learning_curve.draw(trainer.state.log_history, folder)


def _noted(trainer: Trainer, kind: str = output_folder.WROTE) -> AbstractContextManager[None]:
    """Around what writes into the output folder: a run that overwrites this one moves it aside."""
    return (
        output_folder.noted(Path(trainer.args.output_dir), kind) if trainer.is_world_process_zero() else nullcontext()
    )


def _found(metrics: dict[str, float]) -> dict[str, float]:
    """Without how long it took to make the model ready, which upstream adds where nothing was trained before."""
    return {name: each for name, each in metrics.items() if not name.endswith("_model_preparation_time")}


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
        metrics |= _found(output.metrics) | _samples(f"test_{name}" if name else "test", dataset)
        if write is not None and trainer.is_world_process_zero():
            with _noted(trainer, output_folder.PREDICTED):
                write(output, Path(trainer.args.output_dir), *([name] if name else []))
    _keep(trainer, "test", metrics)
    return metrics
