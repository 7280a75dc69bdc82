"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table, without an end of line after the last."""

    def line(cells: Sequence[str]) -> str:
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
