"""Processes of a launcher that was killed: they end, instead of running on unseen and holding devices and ports."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time


logger = logging.getLogger(__name__)  # not accelerate's, which asks other processes perhaps

SECONDS = 1.0  # between two looks


_watching: list[threading.Thread] = []


def end_with_launcher() -> None:
    """If ``torchrun`` or ``accelerate launch`` has started this process and is gone, from now on, the process gets a SIGTERM.

    That is what the launcher sends when it is ended itself: who has asked for a checkpoint then, gets it.
    """
    # Processes started by hand may outlive their shell, as under nohup.
    if "TORCHELASTIC_RUN_ID" in os.environ and not any(each.is_alive() for each in _watching):
        _watching[:] = [threading.Thread(target=_watch, args=(os.getppid(),), daemon=True)]
        _watching[0].start()


def _watch(launcher: int) -> None:
    while True:
        time.sleep(SECONDS)
        if os.getppid() != launcher:
            logger.error(
                f"The launcher of this process (number {launcher}) is gone: the process ends, too. Start the run again with "
                "resume_from_checkpoint=True."
            )
            os.kill(os.getpid(), signal.SIGTERM)
            return
