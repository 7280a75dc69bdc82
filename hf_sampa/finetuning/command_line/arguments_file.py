"""A JSON file of arguments, as `HfArgumentParser.parse_json_file` reads, in front of a command line."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def without_file(parser: ArgumentParser, words: list[str]) -> list[str]:
    """`words` with the arguments of the file that the first one names, if it ends in ``.json``, in its place.

    They come first, so that those on the command line win. Raises SystemExit, with what is wrong, for a file that cannot be read,
    is no object of JSON, or has a name twice or one that is no option's.
    """
    if not words or not words[0].endswith(".json"):
        return words
    try:
        given = json.loads(Path(words[0]).read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (OSError, ValueError) as error:
        parser.error(f'{words[0]}: expected a JSON file of arguments, {{"output_dir": ...}}, got {error}')
    if not isinstance(given, dict):
        parser.error(f'{words[0]}: expected an object, {{"output_dir": ...}}, got a JSON {type(given).__name__}')
    options = {action.dest for action in parser._actions if action.option_strings} - {"help"}
    if unknown := [name for name in given if name not in options]:
        parser.error(f"{words[0]}: expected names of options, got {', '.join(unknown)}{perhaps(unknown[0], options)}")
    return [*(word for name, value in given.items() for word in _words(name, value)), *words[1:]]


def perhaps(name: str, options: Iterable[str]) -> str:
    """Which of the options may be meant by `name`, for the end of a message."""
    close = get_close_matches(name, options, n=1)
    return f" (is it {close[0]}?)" if close else ""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return found


def _words(name: str, value: Any) -> Iterator[str]:
    """How a command line says it; null is nothing."""
    if isinstance(value, list):
        yield from (f"--{name}", *(_word(each) for each in value))
    elif value is not None:
        yield f"--{name}={_word(value)}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
