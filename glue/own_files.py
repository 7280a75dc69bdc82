"""Reading of files of one's own: CSV, TSV, JSON lines. Each is read in full, or refused with the line and what is wrong there.

Nothing is guessed of a value: a field of a CSV file is text, and ``NA`` or ``None`` are words. Rows of a wrong length, quotes
that do not end, columns that are there twice (where they are used) and other encodings than UTF-8 are refused.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from own_tables import Table
from text_lines import LONGEST_LINE, cut, entry, open_text, text_lines


DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = (".json", ".jsonl", ".ndjson")


def read_file(path: str | Path, delimiter: str | None = None, quotes: bool = True) -> Table:
    """Read a file by the ending of its name.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson`` (an object in every line) or ``.json`` (the same, or one array).
        delimiter: between the fields of a table; by default that of the ending.
        quotes: whether fields may be in double quotes, as spreadsheets and pandas write them; otherwise a double quote is a
            character like any other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or it has no rows.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if not path.is_file():
        found = f"{entry(path)} is none" if path.exists() else "there is none"
        raise FileNotFoundError(
            f"{path}: expected a CSV, TSV or JSON lines file, but {found}. Give the path of a file."
        )
    if ending not in (*DELIMITERS, *JSON) and delimiter is None:
        raise ValueError(
            f"{path}: expected a name that ends in {', '.join((*DELIMITERS, *JSON))}, got {ending or 'no ending'!r}. Convert or "
            "rename the file, or say what is between its fields with --delimiter."
        )
    table = _read_json(path) if ending in JSON else _read_fields(path, delimiter or DELIMITERS[ending], quotes)
    if not len(table):
        raise ValueError(f"{path}: expected at least one row, got none. Use another file.")
    return table


def _read_fields(path: Path, delimiter: str, quotes: bool) -> Table:
    rows, lines, end = [], [], 0
    with open_text(path) as file, _long_fields():
        reader = csv.reader(
            text_lines(file, path),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            names = [name.strip() for name in next(reader, [])]
            _check_names(names, path, delimiter)
            end = reader.line_num
            for fields in reader:
                # A field may go on over several lines; the row is called by its first.
                begin, end = end + 1, reader.line_num
                if fields and len(fields) != len(names):
                    raise ValueError(
                        f"{path}, line {begin}: expected {len(names)} fields ({cut(', '.join(names))}), got {len(fields)}. A "
                        f"field that holds {delimiter!r} has to be in double quotes: repair or remove that row."
                    )
                if quotes and delimiter == "\t" and any("\t" in field and "\n" in field for field in fields):
                    raise ValueError(
                        f"{path}, line {begin}: a double quote begins a field that goes on to line {end}, over tabs. If quotes "
                        "are characters like any other in this file, add --quotes false."
                    )
                if fields:
                    rows.append(fields)
                    lines.append(begin)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {end + 1}: expected a row of fields with {delimiter!r} between them, but {error} in the row that "
                "begins there. Repair that row; if double quotes are characters like any other in this file, add --quotes "
                "false."
            ) from error
    columns = {name: [fields[place] for fields in rows] for place, name in enumerate(names)}
    return Table(str(path), tuple(names), columns, lines)


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields of more than 131072 characters, which a document may have."""
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _check_names(names: list[str], path: Path, delimiter: str) -> None:
    if not any(names):
        raise ValueError(
            f"{path}, line 1: expected the names of the columns, got an empty line. Add a first row of names."
        )
    others = [other for other in (",", ";", "\t", "|") if other in names[0]]
    if len(names) == 1 and others:
        raise ValueError(
            f"{path}, line 1: expected the names of several columns with {delimiter!r} between them, got {cut(repr(names[0]))}. "
            f"Is {others[0]!r} between them? Add --delimiter '{others[0]}'."
        )


def _read_json(path: Path) -> Table:
    with open_text(path) as file:
        lines = list(text_lines(file, path))
    if path.suffix.lower() == ".json" and "".join(lines[:1]).lstrip().startswith("["):
        records = list(enumerate(_parse("".join(lines), str(path)), start=0))
        numbers = None
    else:
        records = [
            (number, _parse(line, f"{path}, line {number}")) for number, line in enumerate(lines, 1) if line.strip()
        ]
        numbers = [number for number, _ in records]
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, {'row' if numbers is None else 'line'} {number}: expected a JSON object with the columns as keys, got "
                f"{cut(json.dumps(record))}. Write one object for every row."
            )
    names = tuple(dict.fromkeys(name for _, record in records for name in record))
    if records and not names:
        raise ValueError(f"{path}: expected JSON objects with the columns as keys, got empty ones. Use another file.")
    columns: dict[str, list[Any]] = {name: [record.get(name) for _, record in records] for name in names}
    return Table(str(path), names, columns or {"": []}, numbers)


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"the key {cut(repr(counts.most_common(1)[0][0]))} is there twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (RecursionError, ValueError) as error:  # the latter also of a number of thousands of digits
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(
            f"{where}: expected one JSON object in every line (or in .json one array of them), but {reason}. Repair it."
        ) from error
