"""Which splits of its data a run needs, which rows of them, and what a model card says of that."""

from __future__ import annotations

import logging
import math
from collections import Counter

from datasets import ClassLabel, Dataset, DatasetDict
from text_arguments import TextArguments
from text_lines import quoted

from hf_sampa.finetuning import FineTuningArguments, ModelArguments, is_without_weights


logger = logging.getLogger(__name__)

# By which rows are held out, whatever the run's seed is: a later run scores none that this one trained on. It is the default
# of --seed, by which version 0.1.0 drew them.
_DRAW = 42


def is_scored(args: FineTuningArguments) -> bool:
    """Whether a run needs evaluation data, at its end or on the way."""
    return args.do_eval or (args.do_train and args.eval_strategy != "no")


def split_off(data: DatasetDict, share: float | None, args: FineTuningArguments) -> DatasetDict:
    """`data` with part of "train" as "validation", drawn of every class alike, and the rest of it, each if the run needs it.

    Args:
        data: all of it, if there is a "train" in it.
        share: of the rows, that go to "validation"; None for data that stay as they are.
        args: whether the run trains and scores.

    Raises:
        ValueError: there are too few rows of a class, or at all.
    """
    if share is None or "train" not in data:
        return data
    rows = data["train"]
    label = rows.features["label"]
    classes = isinstance(label, ClassLabel)
    counts = Counter(rows["label"][:] if classes else ())
    _check_share(share, len(rows), {label.int2str(each): count for each, count in counts.items()})
    parts = rows.train_test_split(share, seed=_DRAW, stratify_by_column="label" if classes else None)
    for side, doing in (("train", "train"), ("test", "score")):
        missing = counts.keys() - set(parts[side]["label"][:] if classes else ())
        if missing:
            logger.warning(
                "--train_val_split %g: no row of %s is among those to %s on. Add rows of it, or leave --train_val_split out and score "
                "other rows.",
                share,
                quoted(label.int2str(sorted(missing))),
                doing,
            )
    train = {"train": parts["train"]} if args.do_train else {}
    validation = {"validation": parts["test"]} if is_scored(args) else {}
    others = {split: each for split, each in data.items() if split != "train"}
    return DatasetDict({**train, **validation, **others})


def _check_share(share: float, rows: int, counts: dict[str, int]) -> None:
    """Raise ValueError if not every class can have a row on both sides; `counts` are of the classes, where there are any."""
    if single := sorted(name for name, count in counts.items() if count == 1):
        raise ValueError(
            f"--train_val_split {share:g}: expected at least two rows of every class, one for each side, got one of {quoted(single)}. "
            "Add rows of it or take it out, or leave --train_val_split out and score other rows."
        )
    held_out = math.ceil(share * rows)  # as datasets rounds
    needed = max(1, len(counts))
    if min(held_out, rows - held_out) < needed:
        raise ValueError(
            f"--train_val_split {share:g}: expected at least {needed} of the {rows} rows on both sides{', one of every class' * (needed > 1)}, "
            f"got {held_out} to score on. Give a {'larger' if held_out < needed else 'smaller'} share or more rows, or leave "
            "--train_val_split out and score other rows."
        )


def limit(data: DatasetDict, args: TextArguments) -> DatasetDict:
    """The first rows of every split, as many as ``--max_train_samples`` and its like allow."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}

    def first(split: str, rows: Dataset) -> Dataset:
        limit = limits.get(split.partition("_")[0], args.max_predict_samples)
        return rows.select(range(min(limit or len(rows), len(rows))))

    return DatasetDict({split: first(split, rows) for split, rows in data.items()})


def scored_split(args: TextArguments, train: str = "train", validation: str = "validation") -> str:
    """What a model card calls the split that is scored, given what the data set calls its own."""
    share = args.train_val_split
    return validation if share is None else f"{train}, {100 * share:g}% held out"


def remarks(
    model_args: ModelArguments, args: TextArguments, whole: DatasetDict, tokenized: DatasetDict, max_length: int
) -> list[str]:
    """What a model card is to say of the start, and of what was done to the data: which rows and tokens were left out or held out,
    which labels were replaced.
    """
    found = ["starting from random weights"] if is_without_weights(model_args.model_name_or_path) else []
    # The tokenizer does not say which inputs it has cut: those that are as long as can be.
    cut = any(sum(mask) >= max_length for rows in tokenized.values() for mask in rows["attention_mask"])
    if cut:
        found.append(f"inputs are truncated to {max_length} tokens")
    parts = {}
    if args.train_val_split is not None and "validation" in tokenized:
        found.append(f"scored on {100 * args.train_val_split:g}% of the training rows, which were not trained on")
        parts = {"train": "the rest of train", "validation": "the held-out part of train"}
    for split, rows in tokenized.items():
        if len(rows) < len(whole[split]):
            doing = {"train": "trained on", "validation": "scored on"}.get(split.partition("_")[0], "predicted for")
            part = parts.get(split, split)
            found.append(f"{doing} the first {len(rows)} of {len(whole[split])} examples of {part} only")
    if args.label_noise and "train" in tokenized:
        found.append(f"of the training labels {100 * args.label_noise:g}% were replaced at random")
    return found
