"""The tables that a run needs, from files or from a data set on the Hub, and the data sets that are made of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classification_arguments import ClassificationArguments
from datasets import ClassLabel, Dataset, Value, load_dataset
from datasets import Sequence as ListOf
from own_files import read_file
from own_problem import MULTI, SINGLE
from own_tables import Table, table_of
from text_lines import quoted
from text_splits import is_scored

from hf_sampa.finetuning import FineTuningArguments, ModelArguments


logger = logging.getLogger(__name__)

# What the rows of a split are for, and what to do if there are none.
_NEEDED = {
    "train": "to train on. Name {}, or add --do_train false",
    "validation": "to score on. Name {}, take some of the training rows with --train_val_split 0.1, or add --do_eval false",
    "test": "to predict. Name {}, or leave out --do_predict",
}


def load_tables(
    data_args: ClassificationArguments, model_args: ModelArguments, training_args: FineTuningArguments
) -> dict[str, Table]:
    """The tables "train", "validation" and "test", as far as the run needs them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a table that the run needs is not named, or is not in order.
    """
    wanted = {
        "train": training_args.do_train or (data_args.train_val_split is not None and is_scored(training_args)),
        "validation": is_scored(training_args) and data_args.train_val_split is None,
        "test": training_args.do_predict,
    }
    if data_args.test_file is not None and not training_args.do_predict:
        logger.warning(
            "--test_file is not read without --do_predict. Add it for predictions, or leave out what has no effect."
        )
    splits = [split for split, is_wanted in wanted.items() if is_wanted]
    if data_args.dataset_name is not None:
        return _from_hub(data_args, model_args, splits)
    for split in splits:
        if getattr(data_args, f"{split}_file") is None:
            raise ValueError(f"--{split}_file: expected the rows {_NEEDED[split].format('a file')}.")
    return {
        split: read_file(getattr(data_args, f"{split}_file"), data_args.delimiter, data_args.quotes)
        for split in splits
    }


def _from_hub(
    data_args: ClassificationArguments, model_args: ModelArguments, splits: Sequence[str]
) -> dict[str, Table]:
    name = data_args.dataset_name
    try:
        data = load_dataset(
            name,
            data_args.dataset_config_name,
            revision=data_args.dataset_revision,
            token=model_args.token,
            cache_dir=model_args.cache_dir,
        )
    except ValueError as error:  # of a configuration that is missing, or that there is not; it names those there are
        raise ValueError(f"--dataset_name {name}, --dataset_config_name: {error}") from error
    tables = {}
    for split in splits:
        theirs = getattr(data_args, f"{split}_split_name")
        if theirs not in data:
            raise ValueError(
                f"--{split}_split_name: expected one of the splits of {name}, {quoted(data)}, got {theirs!r} for the rows "
                f"{_NEEDED[split].format('one of these')}."
            )
        if not len(data[theirs]):
            raise ValueError(
                f"{name}: expected at least one row in the split {theirs!r}, got none. Name another split."
            )
        tables[split] = table_of(data[theirs], f"{name}, split {theirs!r}")
    return tables


def with_labels(texts: Dataset, encoded: list[Any], problem_type: str, names: Sequence[str]) -> Dataset:
    """Texts with a column ``label``, as the model takes it."""
    feature = Value("float32")
    if problem_type == SINGLE:
        feature = ClassLabel(names=list(names))
    elif problem_type == MULTI:
        feature = ListOf(Value("float32"))
    return texts.add_column("label", encoded, feature=feature)


def card_facts(data_args: ClassificationArguments) -> dict[str, Any]:
    """What a model card is to say of where the data are from."""
    if data_args.dataset_name is None:
        files = [Path(file).name for file in (data_args.train_file, data_args.validation_file) if file is not None]
        return {"dataset": f"the local file{'s' * (len(files) > 1)} {' and '.join(files)}"} if files else {}
    if Path(data_args.dataset_name).exists():
        return {"dataset": f"the local folder {Path(data_args.dataset_name).resolve().name}"}
    return {
        "dataset": data_args.dataset_name,
        "dataset_tags": data_args.dataset_name,
        "dataset_args": data_args.dataset_config_name,
    }
