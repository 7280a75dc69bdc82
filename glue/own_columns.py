"""Which columns of a table are texts and which is the label: as they are named, or by their usual names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from own_tables import Table
from text_lines import cut, quoted


logger = logging.getLogger(__name__)

# Usual names; those of the first line win over others.
TEXTS = (
    (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
    + (("text1", "text2"), ("text_a", "text_b")),
    (("text",), ("sentence",)),
    (("content",), ("review",), ("comment",), ("document",), ("tweet",), ("message",), ("utterance",)),
)  # fmt: skip
LABELS = (
    (("label",), ("labels",)),
    (("class",), ("category",), ("target",), ("sentiment",), ("score",), ("rating",), ("stars",), ("intent",)),
)


def find_columns(table: Table, texts: str | None, label: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The one or two columns of text, and those of the label: one, or one of 0 and 1 for each of several labels.

    Args:
        table: with the columns.
        texts: their names with a comma between them, if they are given.
        label: the same.

    Returns:
        Both; no label where none is given and none of the usual names is there.

    Raises:
        ValueError: there are no such columns, or columns without a usual name.
    """
    found = _given(table, texts, "--text_column_names") or _guess(table, TEXTS, "--text_column_names")
    if len(found) > 2:
        raise ValueError(f"--text_column_names: expected one or two columns, got {quoted(found)}. Join some of them.")
    labels = _given(table, label, "--label_column_name") or _guess(table, LABELS, "--label_column_name")
    # Of two columns, the one is known by the other.
    others = tuple(name for name in table.names if name not in (*found, *labels))
    if len(table.names) == 2 and len(others) == 1:
        found, labels = found or others, labels or others
    if not found:
        raise ValueError(_which(table, "--text_column_names", "one or two columns of text"))
    if both := set(found) & set(labels):
        raise ValueError(f"--label_column_name: expected another column than the text, got {quoted(both)} for both.")
    if "label" in found:
        raise ValueError(
            "--text_column_names: expected a name other than 'label', which Trainer takes for the labels. Rename it."
        )
    return found, labels


def require(table: Table, columns: Sequence[str], option: str) -> None:
    """See that a table has each of `columns` once.

    Raises:
        ValueError: it does not; `option` is what names them.
    """
    missing = [column for column in columns if column not in table.names]
    if missing:
        raise ValueError(
            f"{option}: expected {quoted(columns)} among the columns of {table.name}, but {quoted(missing)} is not in "
            f"{quoted(table.names)}. Give the names of columns that all files have."
        )
    double = [column for column in columns if table.names.count(column) > 1]
    if double:
        raise ValueError(
            f"{table.name}: expected one column {quoted(double)}, got it {table.names.count(double[0])} times. Rename the others."
        )


def _given(table: Table, names: str | None, option: str) -> tuple[str, ...]:
    if names is None:
        return ()
    columns = (names,) if names in table.names else tuple(name.strip() for name in names.split(","))
    require(table, columns, option)
    return columns


def _guess(table: Table, usual: tuple[tuple[tuple[str, ...], ...], ...], option: str) -> tuple[str, ...]:
    spelled = {name.lower(): name for name in table.names}
    alike = [name.lower() for name in set(table.names)]
    for names in usual:
        found = [columns for columns in names if set(columns) <= spelled.keys()]
        if len(found) > 1 or any(alike.count(name) > 1 for columns in found for name in columns):
            raise ValueError(_which(table, option, "to be told which columns are meant"))
        if found:
            columns = tuple(spelled[name] for name in found[0])
            require(table, columns, option)
            return columns
    return ()


def _which(table: Table, option: str, expected: str) -> str:
    return (
        f"{option}: expected {expected}, since their names do not say it: {table.name} has the columns {quoted(table.names)}. "
        f"Add {option} with a name (two with a comma between them)."
    )


def check_texts(table: Table, columns: Sequence[str]) -> None:
    """See that columns hold text; odd texts are warned of.

    Raises:
        ValueError: a value is no text, or all are empty.
    """
    for column in columns:
        empty, numbers = [], 0
        for index, text in enumerate(table.columns[column]):
            if not isinstance(text, str):
                raise ValueError(
                    f"{table.where(index)}: expected text in column {column!r}, got {cut(repr(text))}. Repair or remove that row, "
                    "or choose another column with --text_column_names."
                )
            if not text.strip():
                empty.append(index)
            numbers += text.strip().replace(".", "", 1).isdecimal()
        if len(empty) == len(table):
            raise ValueError(
                f"{table.name}: expected text in column {column!r}, but it is empty in all {len(table)} rows. Choose another column "
                "with --text_column_names."
            )
        if empty:
            logger.warning(
                "%s: %d of %d rows have no text in column %r (the first: %s).",
                table.name,
                len(empty),
                len(table),
                column,
                table.where(empty[0]),
            )
        if numbers == len(table):
            logger.warning(
                "%s: all texts in column %r are numbers. Is it the right column? --text_column_names chooses another.",
                table.name,
                column,
            )
