"""Files that are whole or not there at all, also when the power fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def in_place_of(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` by one rename at the end of the block: who reads `file` finds the old or the new.

    Where the block raises, or the disk is full, `file` stays as it was. The path begins with an underscore, with which Trainer's
    pushes leave a file out.

    Raises:
        OSError: it cannot be written, or `file` is a folder.
    """
    partial = partial_of(file)
    try:
        yield partial
        sync(partial)
        os.replace(partial, file)
    except BaseException:
        with suppress(OSError):  # what went wrong is on its way
            partial.unlink(missing_ok=True)
        raise


def read_json(file: Path) -> Any:
    """What a file that this package wrote holds. Raises ValueError, with its name, where it is no JSON any more."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file}: expected what was written there, got something else: {error}. Delete it."
        ) from error


def partial_of(file: Path) -> Path:
    """What there is of `file` while it is written, or after the process was killed in it."""
    return file.with_name(f"_{file.name}.partial")


def sync(file: Path) -> None:
    """Wait until a file is on the disk."""
    try:
        opened = os.open(file, os.O_RDWR)  # Windows syncs nothing that was opened for reading
    except (IsADirectoryError, PermissionError):
        opened = os.open(file, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_names(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk, where the system has that."""
    with suppress(OSError):  # as Windows and some network file systems
        sync(folder)
