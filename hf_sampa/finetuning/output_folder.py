"""The output folder and the run whose it is: one that is overwritten is moved aside, and only its own run is continued by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import in_place_of


logger = get_logger(__name__)

# Names that begin so are not pushed to the Hub.
RUN = "_run.json"
REPLACED = "_replaced"
# The second one is a checkpoint that was about to be replaced when the process was killed; a resumed run puts it back.
CHECKPOINTS = (f"{PREFIX_CHECKPOINT_DIR}-*", f"_{PREFIX_CHECKPOINT_DIR}-*")
RESULTS = ("trainer_state.json", "*_results.json", "learning_curve.png", RUN)


def check_own(folder: Path, run: dict[str, Any]) -> None:
    """Raise ValueError if there is no checkpoint in `folder`, or its last run is another one than `run`, as far as its file says."""
    if not any(each for name in CHECKPOINTS for each in folder.glob(name)):
        raise ValueError(
            f"--resume_from_checkpoint true: expected a checkpoint in {folder}, got none: no run in it came as far. Start it anew, "
            "without this option."
        )
    file = folder / RUN
    if not file.is_file():
        return  # of an earlier version
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in run if name in before and before[name] != run[name]]
    if changed:
        then, now = (", ".join(f"{name} {each[name]}" for name in changed) for each in (before, run))
        raise ValueError(
            f"--resume_from_checkpoint true: expected in {folder} a run with {now}, got one with {then}. Choose the --output_dir of "
            "this run, start anew with --overwrite_output_dir, or name the checkpoint that this run is to go on from."
        )


def begin(folder: Path, run: dict[str, Any]) -> None:
    """Note that `run` is started in `folder`; on the main process."""
    folder.mkdir(parents=True, exist_ok=True)
    with in_place_of(folder / RUN) as partial:
        partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def move_aside(folder: Path, checkpoint: str | None) -> None:
    """Move checkpoints and results of the run before out of the way of one that overwrites it; on the main process.

    A checkpoint that stayed would be taken for the new run's when that is resumed, and results would be mixed. Only the one that
    the new run goes on from stays where it is.
    """
    found = [each for name in (*CHECKPOINTS, *RESULTS) for each in folder.glob(name)]
    old = [each for each in found if checkpoint is None or each.resolve() != Path(checkpoint).resolve()]
    if not old:
        return
    number = 1 + max(
        (int(n) for each in folder.glob(f"{REPLACED}-*") if (n := each.name.rpartition("-")[2]).isdigit()), default=0
    )
    aside = folder / f"{REPLACED}-{number}"
    aside.mkdir()
    for each in old:
        os.rename(each, aside / each.name)
    logger.warning(
        f"--overwrite_output_dir: {len(old)} checkpoints and results of the run before are in {aside} now. Delete it if nobody needs "
        "them."
    )
