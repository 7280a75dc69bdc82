"""Processes of a launcher that was killed: they end, instead of running on unseen and holding devices and ports."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


logger = logging.getLogger(__name__)  # not accelerate's, which asks other processes perhaps

SECONDS = 1.0  # between two looks


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """Within the block, if ``torchrun`` or ``accelerate launch`` has started this process and is gone, it gets a SIGTERM.

    That is what the launcher sends when it is ended itself: who has asked for a checkpoint then, gets it.
    """
    # Processes started by hand may outlive their shell, as under nohup.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(os.getppid(), over), daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _watch(launcher: int, over: threading.Event) -> None:
    while not over.wait(SECONDS):
        if os.getppid() != launcher:
            logger.error(
                f"The launcher of this process (number {launcher}) is gone: the process ends, too. Start the run again with "
                "resume_from_checkpoint=True."
            )
            os.kill(os.getpid(), signal.SIGTERM)
            return
