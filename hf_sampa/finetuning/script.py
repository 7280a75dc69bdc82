"""What is around a script's `main`: an error that is the user's is one message, once, and processes end in good order."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore

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
        if not is_left_to_another(message):
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
        sys.exit(1)
    close_groups()  # before the interpreter ends


def is_left_to_another(message: str) -> bool:
    """Whether another process has told, or is about to tell, an error that all of them may have found. The main one answers at once.

    The others are ended by the launcher, as soon as the main one has failed; those which are still there after `SECONDS` may have
    found what it did not find, or it may be slow. So whoever comes first tells it, as far as the launcher keeps a store.
    """
    if any(os.environ.get(name, "0") != "0" for name in RANK_VARIABLES):
        time.sleep(SECONDS)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # set by torchrun and accelerate launch
        return False
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher may start processes again, which have told nothing yet.
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    told = hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        store = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
        return store.add(f"hf_sampa/told/{start}/{told}", 1) > 1
    except DistError:  # the launcher is gone, and with it whoever would know
        return False


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
