"""Reading of the official GLUE files: one folder per task with `train.tsv`, `dev.tsv`, `test.tsv` (MNLI: two of these each).

The files are tab-separated and never quoted: a double quote is a character like any other. They may start with a byte
order mark (MRPC), lack the header row (CoLA, but for test.tsv), spell labels as words (RTE, QNLI, MNLI) or as digits (the
others), and STS-B holds scores. Rows are checked as they are read; the first wrong one is refused with file, line and what
was expected. The one exception are rows of QQP with too few fields: the official files hold some (line 97931 of train.tsv is
one), left by line breaks inside questions. They are left out and counted in a warning, as the Hub's copy of QQP and
fairseq's `preprocess_GLUE_tasks.sh` leave them out. Empty lines hold no row and are passed over.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict
from tasks import DIAGNOSTIC, TASKS, GlueTask
from text_lines import cut, entry, open_text, quoted, text_lines


logger = logging.getLogger(__name__)

# Rows by which the task of a file is known.
_ENOUGH_ROWS = 20

# A field as csv writes one that holds quotes.
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


def read_glue_folder(folder: str | Path, task: GlueTask, splits: Iterable[str] | None = None) -> DatasetDict:
    """Read splits of one task from a folder of official files, under the Hub's names.

    Args:
        folder: of the one task.
        task: whose files it is to hold.
        splits: which to read, of `task.files` and `task.test_files`; by default those with labels. The diagnostic set is left
            out where its file is not there.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: a file or a row is not in the official format, or is another task's.
    """
    folder = Path(folder)
    names = {split: {**task.files, **task.test_files}[split] for split in (task.files if splits is None else splits)}
    if not (folder / task.test_files.get(DIAGNOSTIC, "")).is_file():
        names.pop(DIAGNOSTIC, None)
    try:
        _check_files(folder, names.values(), task)
        return DatasetDict(
            {split: read_glue_file(folder / name, task, split in task.files) for split, name in names.items()}
        )
    except (FileNotFoundError, ValueError) as error:
        if others := _other_tasks_of(folder, task):
            raise ValueError(
                f"{folder}: expected the files of {task.name}, got those of {' or '.join(others)}. Give --task_name "
                f"{others[0]}, or --data_dir the folder of {task.name}."
            ) from error
        raise


def _check_files(folder: Path, names: Iterable[str], task: GlueTask) -> None:
    # Not a link to nothing either, nor a pipe, which would wait for its other end.
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(map(entry, folder.iterdir()))) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: expected a folder with the official files of {task.name} ({', '.join(names)}), "
            f"but {', '.join(missing)} is not there (found: {cut(found)}). Give --data_dir the folder of this one task."
        )


def _other_tasks_of(folder: Path, task: GlueTask) -> list[str]:
    """Tasks whose labelled files these are, by their first rows."""
    return [
        other.name
        for other in TASKS.values()
        if other is not task and any(_begins_as(folder / name, other) for name in other.files.values())
    ]


def _begins_as(path: Path, task: GlueTask) -> bool:
    if not path.is_file():
        return False
    try:
        return bool(list(islice(_labelled_rows(path, task), _ENOUGH_ROWS)))
    except ValueError:
        return False


def read_glue_file(path: str | Path, task: GlueTask, labelled: bool = True) -> Dataset:
    """Read one official file into a dataset with the Hub's columns: `task.features`, or without labels `task.test_features`.

    Raises:
        ValueError: the file or a row is not in the official format.
    """
    path = Path(path)
    features = task.features if labelled else task.test_features
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected rows of {task.name}, got an empty file. Use the official file.")
    rows = list(_labelled_rows(path, task) if labelled else _numbered_rows(path, task))
    if not rows:
        raise ValueError(f"{path}: expected at least one row of {task.name}, got none. Use the official file.")
    columns = {column: [row[place] for row in rows] for place, column in enumerate(features)}
    _warn_of_quotes([text for column in task.text_columns for text in columns[column]], path)
    return Dataset.from_dict(columns, features=features)


def _labelled_rows(path: Path, task: GlueTask) -> Iterator[tuple]:
    """The texts of each row and what its label says."""
    expected = [*task.tsv_columns.values(), task.tsv_label]
    for line, row in _rows(path, task, expected, task.tsv_header, task.has_broken_rows):
        label = _parse_label(row[task.tsv_label], task, f"{path}, line {line}")
        yield *(row[name] for name in task.tsv_columns.values()), label


def _numbered_rows(path: Path, task: GlueTask) -> Iterator[tuple]:
    """The texts of each row to predict, and its number."""
    first_lines: dict[int, int] = {}
    for line, row in _rows(path, task, [*task.tsv_columns.values(), task.tsv_index]):
        text = row[task.tsv_index]
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(
                f"{path}, line {line}: expected the number of the row in column {task.tsv_index!r}, got {cut(repr(text))}. "
                "Use the official file."
            )
        before = first_lines.setdefault(int(text), line)
        if before != line:
            raise ValueError(
                f"{path}, line {line}: expected another number in every row, got {text} as in line {before}. Use the "
                "official file."
            )
        yield *(row[name] for name in task.tsv_columns.values()), int(text)


def _rows(
    path: Path,
    task: GlueTask,
    expected: list[str],
    header: tuple[str, ...] | None = None,
    has_broken_rows: bool = False,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row as (line number from 1, fields by official column name).

    Args:
        path: the file.
        task: whose it is.
        expected: columns that have to be there.
        header: columns of a file without a header row.
        has_broken_rows: whether rows that are too short are left out.
    """
    with open_text(path) as file:
        reader = csv.reader(text_lines(file, path), delimiter="\t", quoting=csv.QUOTE_NONE)
        broken = []
        try:
            header = header or next(reader, [])
            _check_header(header, expected, path, task)
            for fields in reader:
                if len(fields) == len(header):
                    yield reader.line_num, dict(zip(header, fields, strict=True))
                elif fields and has_broken_rows and len(fields) < len(header):
                    broken.append(reader.line_num)
                elif fields:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(header)} tab-separated fields "
                        f"({cut(', '.join(header))}), got {len(fields)}. Repair or remove that line."
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


def _check_header(header: tuple[str, ...] | list[str], expected: list[str], path: Path, task: GlueTask) -> None:
    missing = [name for name in expected if name not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: expected a header row of {task.name} with the columns {quoted(expected)}, "
            f"but {quoted(missing)} is not in {quoted(header) or 'an empty line'}. Use the official file, or another "
            "--task_name."
        )
    double = [name for name in expected if header.count(name) > 1]
    if double:
        raise ValueError(
            f"{path}, line 1: expected one column each of {quoted(expected)}, but {quoted(double)} is in "
            f"{quoted(header)} more than once. Use the official file."
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
                f"{cut(repr(text))}. Correct or remove that line."
            )
        return score
    if text not in task.spellings:
        raise ValueError(
            f"{where}: expected one of the labels of {task.name}, {quoted(task.spellings)}, in column {task.tsv_label!r}, "
            f"got {cut(repr(text))}. Correct or remove that line."
        )
    return task.spellings.index(text)


def _warn_of_quotes(texts: list[str], path: Path) -> None:
    """A table that was saved with quotes is read as it stands, but not without a word."""
    inside = [text[1:-1] for text in texts if _QUOTED_FIELD.fullmatch(text)]
    # Some official sentences are quotations from their first to their last word.
    if len(inside) > len(texts) / 2 or any('""' in text for text in inside):
        logger.warning(
            "%s: %d of %d texts are in double quotes, some as a spreadsheet writes them. Official files have no quoting, so "
            "that they are read as they stand, with the quotes. If they do not belong there, save the file without quoting.",
            path,
            len(inside),
            len(texts),
        )
