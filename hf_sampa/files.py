"""Files that are whole or not there at all, also when the power fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    finally:
        partial.unlink(missing_ok=True)


def partial_of(file: Path) -> Path:
    """What there is of `file` while it is written, or after the process was killed in it."""
    return file.with_name(f"_{file.name}.partial")


def sync(path: Path) -> None:
    """Wait until a file, or the names of those in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # it syncs nothing that was opened for reading
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
