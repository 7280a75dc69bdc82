"""A checkpoint that is written anew: the old one is moved aside until the new one is whole, and put back if it never is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import dcp
from .checkpoint import is_whole
from .whole import is_needed, weights_in


def aside_of(folder: Path) -> Path:
    """Where the old one is meanwhile: no name that a rotation, or a push, takes for a checkpoint's."""
    return folder.with_name(f"_{folder.name}.replaced")


@contextmanager
def replacing(folder: Path) -> Iterator[Path | None]:
    """Within the block `folder` is written; yields where the old one is meanwhile, if there was one.

    Should the block raise, what it wrote is removed and the old one put back; should the process be killed, `restore` does that.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file")
    restore(folder)
    aside = aside_of(folder)
    if folder.exists():
        _remove(aside)  # of two that are not whole, the later one
        os.rename(folder, aside)
    try:
        yield aside if aside.exists() else None
    except BaseException:
        with suppress(OSError):  # of a disk that takes nothing any more; `restore` does it when the run goes on
            if is_whole(folder):  # what failed came after it: a push, or the removal of old ones
                _finish(folder, aside)
            else:
                _put_back(folder, aside)
        raise
    _finish(folder, aside)


def restore(folder: Path) -> None:
    """Put the old checkpoint back where a process was killed before the new one, `folder`, was whole."""
    aside = aside_of(folder)
    if not aside.exists():
        return
    if is_whole(folder):
        _finish(folder, aside)
    elif is_whole(aside):
        _put_back(folder, aside)


def restore_all(output_dir: Path) -> None:
    """`restore` every checkpoint in `output_dir`."""
    for aside in output_dir.glob(aside_of(Path("checkpoint-*")).name):
        restore(aside.with_name(aside.name.removeprefix("_").removesuffix(".replaced")))


def _put_back(folder: Path, aside: Path) -> None:
    _remove(folder)
    if aside.exists():
        os.rename(aside, folder)


def _finish(folder: Path, aside: Path) -> None:
    """Remove the old one, but for what others put into it: it is theirs."""
    for path in aside.iterdir() if aside.exists() else ():
        if not (folder / path.name).exists() and not _is_of_the_run(path):
            shutil.move(path, folder / path.name)
    _remove(aside)


def _remove(folder: Path) -> None:
    """A folder with all that is in it; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _is_of_the_run(path: Path) -> bool:
    """Whether `path` is state of the old checkpoint, which would be taken for the new one's."""
    if path.is_dir():
        return path.name in (dcp.MODEL, dcp.OPTIMIZER, dcp.OWN) or bool(weights_in(path))
    return is_needed(path.name) or path.name.startswith(("sampa", "rng_state"))
