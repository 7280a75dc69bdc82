"""From texts to what a model reads: the tokenizer, the longest input, the tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from datasets import ClassLabel, Dataset
from text_arguments import TextArguments, TextModelArguments
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


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
