"""What is around a script's `main`: an error that is the user's is one message, once, and processes end in good order."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ..distributed import RANK_VARIABLES, close_groups


PACKAGE = Path(__file__).parents[1]
# Within which a launcher ends the other processes, when one of them has failed.
SECONDS = 5.0
# How torch raises once more what a worker of a loader has found: with the worker's traceback in its text.
IN_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")
FRAME = re.compile(r'^  File "(.+)", line \d+, in .+\n    (.+)$', re.MULTILINE)


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main`, at the end of the script: ``if __name__ == "__main__": run_main(main)``.

    A ValueError that this package or the script raised, and an OSError, are what settings, files or the Hub are told wrong: they
    end the process with exit code 1 and their message. All else is raised with its traceback.
    """
    try:
        main()
    except (OSError, ValueError) as error:
        message = _told(error)
        if message is None:
            raise
        let_main_process_speak()
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
        sys.exit(1)
    close_groups()  # before the interpreter ends


def let_main_process_speak() -> None:
    """Before an error is told that all processes may have found: only the main one goes on at once.

    The others are ended by the launcher, as soon as the main one has failed; those which are still there afterwards found what
    it did not find.
    """
    if any(os.environ.get(name, "0") != "0" for name in RANK_VARIABLES):
        time.sleep(SECONDS)


def _told(error: OSError | ValueError) -> str | None:
    """What was told to a person on purpose; None of another error."""
    message = str(error)
    frames = [(frame.filename, frame.line or "") for frame in traceback.extract_tb(error.__traceback__)]
    if IN_A_WORKER.match(message):
        frames = FRAME.findall(message)
        message = message.rpartition(f"\n{type(error).__name__}: ")[2].rstrip()
    if isinstance(error, OSError):
        return message
    name, line = frames[-1]
    own = (PACKAGE, Path(sys.argv[0]).resolve().parent)
    on_purpose = line.startswith("raise ") and any(Path(name).resolve().is_relative_to(each) for each in own)
    return message if on_purpose else None
