"""Several calls of one comparison at a time: what one of them is at, the others wait for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

HELD = ".held"  # in the folder of a run, and in that of the comparison
SECONDS_BETWEEN_LOOKS = 0.5  # at what another process is at


@contextmanager
def held(file: Path, ending: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, ...]]:
    """Within the block no other call has this `file`: waits for the one that has it, unless all is `ending`.

    Gives file descriptors to pass on: a process that has them, as a launcher, holds the file, too, also when this one is killed.
    """
    if fcntl is None:
        yield ()
        return
    with file.open("w") as opened:
        waiting = False
        while not ending():
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    words = f"{file.parent}: a process of another call is at it; waiting for its end."
                    tqdm.write(words, file=sys.stderr)
                waiting = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
        yield (opened.fileno(),)
