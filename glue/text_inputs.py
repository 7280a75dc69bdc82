"""From texts to what a model reads: the tokenizer, the longest input, the tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, DatasetDict
from text_arguments import TextArguments, TextModelArguments
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_sampa.finetuning import ClassNames, FineTuningArguments, ModelArguments


logger = logging.getLogger(__name__)


def load_tokenizer(args: TextModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that `args` name.

    Raises:
        ValueError: it cannot pad a batch.
    """
    name = args.tokenizer_name or args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, **args.hub_arguments())
    if tokenizer.pad_token is None:
        raise ValueError(
            f"--tokenizer_name: expected a tokenizer with a padding token, for batches of texts of several lengths, got {name} "
            "without. Give one that has it, and a model whose configuration has its pad_token_id."
        )
    return tokenizer


def longest_input(args: TextArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """``--max_length``, or what the model allows if that is less; this is warned of."""
    # A tokenizer that knows of no limit has 10^30; a model whose positions are relative has none.
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    allowed = min(limit for limit in limits if limit is not None)
    if args.max_length > allowed:
        logger.warning(
            "--max_length %d is above the longest input of the model, %d tokens: inputs are truncated to these.",
            args.max_length,
            allowed,
        )
    return min(args.max_length, allowed)


def is_scored(args: FineTuningArguments) -> bool:
    """Whether a run needs evaluation data, at its end or on the way."""
    return args.do_eval or (args.do_train and args.eval_strategy != "no")


def limit(data: DatasetDict, args: TextArguments) -> DatasetDict:
    """The first rows of every split, as many as ``--max_train_samples`` and its like allow."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    return DatasetDict(
        {
            split: rows.take(limits.get(split.partition("_")[0], args.max_predict_samples) or len(rows))
            for split, rows in data.items()
        }
    )


def remarks(whole: DatasetDict, tokenized: DatasetDict, max_length: int) -> list[str]:
    """What a model card is to say of what was left out: of texts that were too long, of rows beyond a limit."""
    # The tokenizer does not say which inputs it has cut: those that are as long as can be.
    cut = any(sum(mask) >= max_length for rows in tokenized.values() for mask in rows["attention_mask"])
    found = [f"inputs are truncated to {max_length} tokens"] if cut else []
    for split, rows in tokenized.items():
        if len(rows) < len(whole[split]):
            doing = {"train": "trained on", "validation": "scored on"}.get(split.partition("_")[0], "predicted for")
            found.append(f"{doing} the first {len(rows)} of {len(whole[split])} examples of {split} only")
    return found


def check_head(classes: ClassNames, model_args: ModelArguments, training_args: FineTuningArguments) -> None:
    """See that a model which is not to be trained has been.

    Raises:
        ValueError: its head is new.
    """
    if classes.new_head and not training_args.do_train:
        raise ValueError(
            f"--do_train false: expected a model that is trained for {', '.join(classes.names)}, got "
            f"{model_args.model_name_or_path}, whose head is new: its scores and predictions would be random. Give "
            "--model_name_or_path a trained one."
        )


def tokenize(
    data: Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pad: bool = False,
) -> Dataset:
    """Token ids in the place of one or two columns of text. Unless `pad`, padding is left to the collator.

    Args:
        data: with a column ``label`` or without one; other columns are dropped.
        columns: of the texts, in the order in which the model reads them.
        tokenizer: of the model.
        max_length: longest input in tokens; longer ones are truncated.
        pad: whether every input is padded to `max_length`.
    """
    texts = [column for column in data.column_names if column != "label"]
    padding = "max_length" if pad else False

    def tokens(rows: dict) -> dict:
        return tokenizer(
            *(rows[column] for column in columns),
            truncation=True,
            max_length=max_length,
            padding=padding,
            return_attention_mask=True,
        )

    return data.map(tokens, batched=True, remove_columns=texts, desc="tokenizing")


def map_labels(data: Dataset, ids: Sequence[int], names: Sequence[str]) -> Dataset:
    """Labels as the model numbers them: ``ids[label]``, with the names of the model's classes."""
    if list(ids) != list(range(len(ids))):
        data = data.map(lambda rows: {"label": [ids[label] for label in rows["label"]]}, batched=True)
    return data.cast_column("label", ClassLabel(names=list(names)))
