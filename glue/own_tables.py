"""Rows of one's own data: what a file or a split of a Hub data set holds, and what messages call each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class Table:
    """Rows as they came.

    Args:
        name: what messages call it.
        names: of the columns, as often as each is there.
        columns: the values of each column.
        lines: of the file, for each row; None where rows are counted instead, from 0.
        rows: the same as a data set, where it came as one.
    """

    name: str
    names: tuple[str, ...]
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    rows: Dataset | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, index: int) -> str:
        """What messages call a row."""
        return f"{self.name}, row {index}" if self.lines is None else f"{self.name}, line {self.lines[index]}"

    def texts(self, columns: Sequence[str]) -> Dataset:
        """Columns of text as a data set."""
        if self.rows is not None:
            return self.rows.select_columns(list(columns))
        return Dataset.from_dict({column: self.columns[column] for column in columns})


def table_of(rows: Dataset, name: str) -> Table:
    """The table of a data set, whose columns are read when they are asked for."""
    return Table(name, tuple(rows.column_names), {column: rows[column] for column in rows.column_names}, rows=rows)
