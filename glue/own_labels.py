"""The labels of a table: the words that stand there, or tuples of them where a text may have several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel
from own_tables import Table
from text_lines import cut, quoted

from hf_sampa.finetuning import same_names


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The labels of a table.

    Args:
        table: whose rows they are of.
        column: what messages call the column.
        values: for each row a word, a tuple of words, or None if there is none.
        names: classes in their order, where the data say it.
    """

    table: Table
    column: str
    values: list[str | tuple[str, ...] | None]
    names: tuple[str, ...] | None = None

    @property
    def words(self) -> set[str]:
        """All that stand in the rows."""
        return {word for value in self.values for word in (value if isinstance(value, tuple) else (value,)) if word}

    def refuse(self, index: int, expected: str, instead: str) -> ValueError:
        """What is said of a row."""
        value = self.values[index]
        got = "nothing" if value is None else cut(repr(value))
        return ValueError(
            f"{self.table.where(index)}: expected {expected} in column {self.column!r}, got {got}. {instead}"
        )


def read_labels(table: Table, columns: Sequence[str], delimiter: str | None = None) -> Labels:
    """The labels of a table.

    Args:
        table: with the columns.
        columns: the one of the label, or several with 0 and 1 in them, each named as a label that a text has or has not.
        delimiter: between the labels of one text, if there can be several in a field.

    Raises:
        ValueError: a value is no label, or there is neither 0 nor 1 in one of several columns.
    """
    if len(columns) > 1:
        flags = [_flags(table, column) for column in columns]
        values = [
            tuple(name for name, flag in zip(columns, row, strict=True) if flag) for row in zip(*flags, strict=True)
        ]
        return Labels(table, ", ".join(columns), values, tuple(columns))
    (column,) = columns
    feature = table.rows.features[column] if table.rows is not None else None
    feature = getattr(feature, "feature", feature)  # of a list of labels
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    values = [
        _word(value, names, delimiter, table, index, column) for index, value in enumerate(table.columns[column])
    ]
    return Labels(table, column, values, names)


def _flags(table: Table, column: str) -> list[bool]:
    words = ["".join(str(value).lower().split()) for value in table.columns[column]]
    for index, word in enumerate(words):
        if word not in ("0", "1", "0.0", "1.0", "true", "false"):
            raise ValueError(
                f"{table.where(index)}: expected 0 or 1 in column {column!r}, one of several labels, got "
                f"{cut(repr(table.columns[column][index]))}. Correct or remove that row."
            )
    return [word in ("1", "1.0", "true") for word in words]


def _word(
    value: Any, names: tuple[str, ...] | None, delimiter: str | None, table: Table, index: int, column: str
) -> str | tuple[str, ...] | None:
    """One label as words."""
    if isinstance(value, list):
        words = [_word(each, names, None, table, index, column) for each in value]
        if all(isinstance(word, str) for word in words):
            return tuple(words)
    elif isinstance(value, str):
        if delimiter is not None:
            return tuple(word.strip() for word in value.split(delimiter) if word.strip())
        return value.strip() or None
    elif isinstance(value, bool):
        return str(value).lower()
    elif value is None or (names is not None and value < 0):
        # Hub data sets have -1 where a label is kept back.
        return None
    elif isinstance(value, (int, float)):
        return str(value) if names is None else names[value]
    raise ValueError(
        f"{table.where(index)}: expected a label in column {column!r}: words, a number or a list of words, got "
        f"{cut(repr(value))}. Repair or remove that row, or choose another column with --label_column_name."
    )


def spelled_as(labels: Labels, names: Sequence[str]) -> Labels:
    """`labels` with the names of a model's classes, where they differ in case; left as they are where they are other words.

    Numbers are taken for outputs that have no names but LABEL_0, LABEL_1, ..., with a warning.

    Raises:
        ValueError: the labels are numbers, and the classes have names.
    """
    words = labels.words
    spelling = same_names(names, words.union(labels.names or ())) or same_names(names, words)
    if spelling is None:
        spelling = {str(index): name for index, name in enumerate(names) if name == f"LABEL_{index}"}
        if not words <= spelling.keys():
            if all(word.isdecimal() for word in words):
                raise ValueError(
                    f"{labels.table.name}: expected the names of the model's classes, {quoted(names)}, in column "
                    f"{labels.column!r}, got the numbers {quoted(sorted(words))}, which may count them from 0, from 1, or in "
                    "another order. Write the name of its class in the place of each."
                )
            return labels
        logger.warning(
            "%s: the labels %s are taken for the model's outputs in their order, %s.",
            labels.table.name,
            quoted(sorted(words)),
            quoted(names),
        )

    def respell(word: str | None) -> str | None:
        return word and spelling[word]

    values = [tuple(map(respell, value)) if isinstance(value, tuple) else respell(value) for value in labels.values]
    return replace(labels, values=values, names=labels.names and tuple(spelling.get(n, n) for n in labels.names))
