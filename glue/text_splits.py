"""Which splits of its data a run needs, how many rows of them, and what a model card says of that."""

from __future__ import annotations

from datasets import Dataset, DatasetDict
from text_arguments import TextArguments

from hf_sampa.finetuning import FineTuningArguments, ModelArguments, is_without_weights


def is_scored(args: FineTuningArguments) -> bool:
    """Whether a run needs evaluation data, at its end or on the way."""
    return args.do_eval or (args.do_train and args.eval_strategy != "no")


def limit(data: DatasetDict, args: TextArguments) -> DatasetDict:
    """The first rows of every split, as many as ``--max_train_samples`` and its like allow."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}

    def first(split: str, rows: Dataset) -> Dataset:
        limit = limits.get(split.partition("_")[0], args.max_predict_samples)
        return rows.select(range(min(limit or len(rows), len(rows))))

    return DatasetDict({split: first(split, rows) for split, rows in data.items()})


def remarks(model_args: ModelArguments, whole: DatasetDict, tokenized: DatasetDict, max_length: int) -> list[str]:
    """What a model card is to say of the start, and of what was left out: of texts that were too long, of rows beyond a limit."""
    found = ["starting from random weights"] if is_without_weights(model_args.model_name_or_path) else []
    # The tokenizer does not say which inputs it has cut: those that are as long as can be.
    cut = any(sum(mask) >= max_length for rows in tokenized.values() for mask in rows["attention_mask"])
    if cut:
        found.append(f"inputs are truncated to {max_length} tokens")
    for split, rows in tokenized.items():
        if len(rows) < len(whole[split]):
            doing = {"train": "trained on", "validation": "scored on"}.get(split.partition("_")[0], "predicted for")
            found.append(f"{doing} the first {len(rows)} of {len(whole[split])} examples of {split} only")
    return found
