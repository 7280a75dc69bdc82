"""Lines of a file, each found to be text, and what messages show of what a file holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO


# Characters of a line, far beyond the longest of the official GLUE files: a longer one is not read into memory first.
LONGEST_LINE = 1 << 20


def open_text(path: Path) -> TextIO:
    """Open a file for `text_lines`; the caller closes it. A byte order mark is left out.

    newline="" leaves line ends to who reads on: csv breaks rows at \\n, \\r\\n and \\r only, not at U+2028 and the like. Bytes
    that are no UTF-8 are kept for `text_lines`, which knows their line.
    """
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def text_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file that `open_text` opened.

    Raises:
        ValueError: a line is no UTF-8, holds a NUL character, or is `LONGEST_LINE` characters long.
    """
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), start=1):
        try:
            line.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: expected UTF-8, got other bytes ({error.reason}). Convert the file to UTF-8."
            ) from error
        if "\0" in line:
            raise ValueError(
                f"{path}, line {number}: expected text, got a NUL character. The file is damaged, or in another encoding "
                "than UTF-8: use the undamaged file, or convert it."
            )
        if len(line) == LONGEST_LINE:
            raise ValueError(
                f"{path}, line {number}: expected a row of a table, got a line of {LONGEST_LINE} characters or more. Repair "
                "that line."
            )
        yield line


def entry(path: Path) -> str:
    """How a message lists what a folder holds."""
    return path.name + ("" if path.is_file() else "/" if path.is_dir() else " (no file)")


def quoted(names: Iterable[object]) -> str:
    """Several names in a message."""
    return cut(", ".join(repr(name) for name in names))


def cut(text: str) -> str:
    """What a message shows of what a file holds, however much that is."""
    return text if len(text) <= 200 else f"{text[:200]}..."
