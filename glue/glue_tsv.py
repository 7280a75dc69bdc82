"""Reading of the official GLUE files: one folder per task with `train.tsv`, `dev.tsv` (MNLI: two dev files).

The files are tab-separated and never quoted: a double quote is a character like any other. They may start with a byte
order mark (MRPC), lack the header row (CoLA), spell labels as words (RTE, QNLI, MNLI) or as digits (the others), and
STS-B holds scores. Rows are checked as they are read; the first wrong one is refused with file, line and what was
expected. The one exception are rows of QQP with too few fields: the official files hold some (line 97931 of train.tsv is
one), left by line breaks inside questions. They are left out and counted in a warning, as the Hub's copy of QQP and
fairseq's `preprocess_GLUE_tasks.sh` leave them out. Empty lines hold no row and are passed over.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from datasets import Dataset, DatasetDict
from tasks import GlueTask


logger = logging.getLogger(__name__)

# Characters of a line, far beyond the longest of the official files: a longer one is not read into memory first.
_LONGEST_LINE = 1 << 20


def read_glue_folder(folder: str | Path, task: GlueTask) -> DatasetDict:
    """Read the labelled splits of one task from a folder of official files, under the Hub's names.

    Raises:
        FileNotFoundError: one of the task's files is not there.
        ValueError: a file or a row is not in the official format.
    """
    folder = Path(folder)
    # Not a link to nothing either, nor a pipe, which would wait for its other end.
    missing = [name for name in task.files.values() if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(map(_entry, folder.iterdir()))) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: expected a folder with the official files of {task.name} ({', '.join(task.files.values())}), "
            f"but {', '.join(missing)} is not there (found: {_cut(found)}). Give --data_dir the folder of this one task."
        )
    return DatasetDict({split: read_glue_file(folder / name, task) for split, name in task.files.items()})


def _entry(path: Path) -> str:
    """How a message lists what a folder holds."""
    return path.name + ("" if path.is_file() else "/" if path.is_dir() else " (no file)")


def read_glue_file(path: str | Path, task: GlueTask) -> Dataset:
    """Read one official file into a dataset with the Hub's columns (`task.features`).

    Raises:
        ValueError: the file or a row is not in the official format.
    """
    path = Path(path)
    columns: dict[str, list] = {column: [] for column in task.features}
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected rows of {task.name}, got an empty file. Use the official file.")
    # newline="" leaves line ends to csv, which breaks rows at \n, \r\n and \r only (and not at U+2028 and the like).
    # Bytes that are no UTF-8 are kept for `_lines`, which knows their line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for line, row in _rows(file, path, task):
            for column, name in task.tsv_columns.items():
                columns[column].append(row[name])
            columns["label"].append(_parse_label(row[task.tsv_label], task, f"{path}, line {line}"))
    if not columns["label"]:
        raise ValueError(f"{path}: expected at least one row of {task.name}, got none. Use the official file.")
    return Dataset.from_dict(columns, features=task.features)


def _rows(file: TextIO, path: Path, task: GlueTask) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row as (line number from 1, fields by official column name)."""
    reader = csv.reader(_lines(file, path), delimiter="\t", quoting=csv.QUOTE_NONE)
    broken = []
    try:
        header = task.tsv_header or next(reader, [])
        _check_header(header, path, task)
        for fields in reader:
            if len(fields) == len(header):
                yield reader.line_num, dict(zip(header, fields, strict=True))
            elif fields and task.has_broken_rows and len(fields) < len(header):
                broken.append(reader.line_num)
            elif fields:
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(header)} tab-separated fields "
                    f"({_cut(', '.join(header))}), got {len(fields)}. Repair or remove that line."
                )
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: expected a row of tab-separated fields, but {error}. Repair that line."
        ) from error
    if broken:
        logger.warning(
            "%s: left out %d rows with fewer than %d fields (a line break inside a question; first at line %d).",
            path,
            len(broken),
            len(header),
            broken[0],
        )


def _check_header(header: tuple[str, ...] | list[str], path: Path, task: GlueTask) -> None:
    expected = [*task.tsv_columns.values(), task.tsv_label]
    missing = [name for name in expected if name not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: expected a header row of {task.name} with the columns {_quoted(expected)}, "
            f"but {_quoted(missing)} is not in {_quoted(header) or 'an empty line'}. Use the official file, or another "
            "--task_name."
        )
    double = [name for name in expected if header.count(name) > 1]
    if double:
        raise ValueError(
            f"{path}, line 1: expected one column each of {_quoted(expected)}, but {_quoted(double)} is in "
            f"{_quoted(header)} more than once. Use the official file."
        )


def _parse_label(text: str, task: GlueTask, where: str) -> int | float:
    """Class index or score that a label field spells. `where` (file and line) opens the error message."""
    if task.is_regression:
        low, high = task.score_range
        # float() alone would read 0_4 as 4.
        score = float(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", text) else float("nan")
        if not low <= score <= high:  # also refuses nan
            raise ValueError(
                f"{where}: expected a score from {low:g} to {high:g} in column {task.tsv_label!r}, got "
                f"{_cut(repr(text))}. Correct or remove that line."
            )
        return score
    spellings = task.labels if task.labels_as_words else tuple(str(index) for index in range(len(task.labels)))
    if text not in spellings:
        raise ValueError(
            f"{where}: expected one of the labels of {task.name}, {_quoted(spellings)}, in column {task.tsv_label!r}, "
            f"got {_cut(repr(text))}. Correct or remove that line."
        )
    return spellings.index(text)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of the file, each found to be text."""
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), start=1):
        try:
            line.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: expected UTF-8, got other bytes ({error.reason}). Convert the file to UTF-8."
            ) from error
        if "\0" in line:
            raise ValueError(
                f"{path}, line {number}: expected text, got a NUL character. The file is damaged, or in another encoding "
                "than UTF-8: use the official file."
            )
        if len(line) == _LONGEST_LINE:
            raise ValueError(
                f"{path}, line {number}: expected a row of tab-separated fields, got a line of {_LONGEST_LINE} characters "
                "or more. Repair that line."
            )
        yield line


def _quoted(names: tuple[str, ...] | list[str]) -> str:
    return _cut(", ".join(repr(name) for name in names))


def _cut(text: str) -> str:
    """What a message shows of what a file holds, however much that is."""
    return text if len(text) <= 200 else f"{text[:200]}..."
