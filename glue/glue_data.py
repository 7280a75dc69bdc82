"""The splits of a GLUE task that a run needs, from the Hub or from a folder of official files."""

from __future__ import annotations

import logging

from datasets import Dataset, DatasetDict, load_dataset
from glue_arguments import GlueArguments
from glue_tsv import read_glue_folder
from tasks import DIAGNOSTIC, HUB_DATASET, GlueTask
from text_splits import is_scored

from hf_sampa.finetuning import FineTuningArguments


logger = logging.getLogger(__name__)


def load_data(task: GlueTask, glue_args: GlueArguments, training_args: FineTuningArguments) -> DatasetDict:
    """The splits that are trained on, scored and predicted; no others are read. Of those that are held out, the whole.

    Raises:
        FileNotFoundError: a file of such a split is not there.
        ValueError: a file is not in order.
    """
    scored = is_scored(training_args)
    held_out = glue_args.train_val_split is not None
    splits = [
        *(["train"] if training_args.do_train or (scored and held_out) else []),
        *(task.dev_files if scored and not held_out else []),
        *(task.submissions if training_args.do_predict else []),
    ]
    if glue_args.data_dir is not None:
        return read_glue_folder(glue_args.data_dir, task, splits)
    return DatasetDict({split: _from_hub(split, task) for split in splits})


def _from_hub(split: str, task: GlueTask) -> Dataset:
    if split == DIAGNOSTIC:
        return load_dataset(HUB_DATASET, DIAGNOSTIC, split="test").remove_columns("label")
    rows = load_dataset(HUB_DATASET, task.name, split=split)
    # To be predicted: most labels are -1 there, and MRPC's are not the benchmark's business.
    return rows.remove_columns("label" if split in task.submissions else "idx")


def check_labels(data: DatasetDict, task: GlueTask) -> None:
    """See whether the labels of each split differ from one another, and warn where they do not.

    Raises:
        ValueError: the scores of a dev set are all the same.
    """
    for split, rows in data.items():
        found = rows.unique("label") if "label" in rows.column_names else ()
        if len(found) != 1:
            continue
        if task.is_regression and split in task.dev_files:
            raise ValueError(
                f"{split} of {task.name}: expected scores that differ, got {found[0]:g} in all of its {len(rows)} rows, with "
                "which nothing correlates. Use the official file, a larger --max_eval_samples, or --do_eval false."
            )
        label = f"{found[0]:g}" if task.is_regression else task.labels[found[0]]
        logger.warning(
            "%s of %s: all of its %d rows have the label %s, so that nothing can be told apart by them.",
            split,
            task.name,
            len(rows),
            label,
        )
