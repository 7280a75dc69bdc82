"""Files that several processes write, any of which may fail: none waits for another meanwhile, and all give up together."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..distributed import Exchange, PeerLost


class NotSaved(OSError):
    """A checkpoint could not be written, here or by another process."""


class Writing:
    """A checkpoint while it is written.

    Args:
        exchange: connects the processes.

    Attributes:
        over: whether the processes have given it up.
    """

    def __init__(self, exchange: Exchange):
        self._exchange, self.over = exchange, False
        self._failed: tuple[str, Exception] | None = None  # what, of this process, and why

    def attempt(self, what: str, write: Callable[[], Any]) -> Any:
        """`write` a part of it; what fails is kept until the processes `agree`. Nothing is written after it."""
        if self._failed is None:
            try:
                return write()
            except PeerLost:
                raise
            # Whatever it is: `agree` raises it again, once no other process waits for this one.
            except Exception as error:
                self._failed = what, error
        return None

    def agree(self) -> None:
        """Go on if all processes could write what they had to. A collective.

        Raises:
            NotSaved: the disk did not take it.
            Exception: what failed on this process, otherwise.
            RuntimeError: something else failed on another one.
        """
        if self.over:
            return
        own = self._failed and (disk_problem(self._failed[1]) is not None, _in_words(*self._failed))
        failed = [each for each in self._exchange.share_objects(own) if each]
        if not failed:
            return
        self.over = True
        if own and not own[0]:
            raise self._failed[1]
        if self._failed:
            _let_go(self._failed[1])
        if others := [words for of_the_disk, words in failed if not of_the_disk]:
            raise RuntimeError(
                f"A checkpoint was given up, because another process failed to write {others[0]}; see its log. "
                "Start the run again with resume_from_checkpoint=True."
            )
        raise NotSaved(failed[0][1])

    def agree_on(self, error: Exception) -> NotSaved:
        """`agree`, where `error` has ended the writing on this process; raises what no run goes on after. A collective."""
        self._failed = self._failed or ("its files", error)
        try:
            self.agree()
        except NotSaved as problem:
            return problem
        if isinstance(error, NotSaved):
            return error
        raise error


def disk_problem(error: Exception) -> str | None:
    """In words, why the disk did not take a file; None for any other error."""
    text = str(error)
    if isinstance(error, OSError):
        return text
    if isinstance(error, SafetensorError) and "I/O error" in text:
        return text.partition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and _raised_in(error) == "torch.serialization":
        return "torch could not write the file, as on a full disk"  # its writer gives no reason, in words that differ
    return None


def _let_go(error: BaseException | None) -> None:
    """Of what the frames hold that `error` went through: a file that could not be written is open there, and takes room."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _raised_in(error: Exception) -> str | None:
    """The module whose code raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__") if frames else None


def _in_words(what: str, error: Exception) -> str:
    return f"{what} ({disk_problem(error) or f'{type(error).__name__}: {error}'})"


def room(folder: Path) -> str:
    """How much the disk of `folder` takes, as far as that can be told."""
    there = next(each for each in folder.absolute().parents if each.is_dir())
    try:
        return f"; {shutil.disk_usage(there).free:,} are free in {there}"
    except OSError:
        return ""
