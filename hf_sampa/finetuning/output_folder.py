"""The output folder and the run whose it is: what would be replaced is moved aside, and only its own run is continued."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards import why_left_alone
from ..files import in_place_of


logger = get_logger(__name__)

# Names that begin so are not pushed to the Hub.
RUN = "_run.json"
REPLACED = "_replaced"
# The second one is a checkpoint that was about to be replaced when the process was killed; a resumed run puts it back.
CHECKPOINTS = (f"{PREFIX_CHECKPOINT_DIR}-*", f"_{PREFIX_CHECKPOINT_DIR}-*")
SPLITS = ("train", "eval", "test")
ALL_RESULTS = "all_results.json"
RESULTS = ("trainer_state.json", "learning_curve.png", ALL_RESULTS, *(f"{split}_results.json" for split in SPLITS))
CARD = "README.md"
# What a note says besides the run: the names of files that it wrote, of predictions among them, and a move that was begun.
WROTE, PREDICTED, MOVING = "wrote", "predicted", "moving"


def open_again(folder: Path) -> None:
    """Finish moving aside what a process had begun to move when it was killed; on the main process."""
    note = _note(folder)
    if moving := note.pop(MOVING, None):
        _move(folder, moving["names"], folder / Path(moving["to"]).name)
        _write(folder, note)


def check_has_checkpoint(folder: Path) -> None:
    """Raise ValueError if there is no checkpoint in `folder`."""
    if not any(each for name in CHECKPOINTS for each in folder.glob(name)):
        raise ValueError(
            f"--resume_from_checkpoint true: expected a checkpoint in {folder}, got none: no run in it came as far. Start it anew, "
            "with --overwrite_output_dir in the place of this option."
        )


def check_own(folder: Path, run: dict[str, Any], checkpoint: str, way_out: str) -> None:
    """Raise ValueError if the last run in `folder` is another one than `run`, as far as its note says.

    Args:
        folder: where `run` is to go on, or where its checkpoint is.
        run: what is to be continued.
        checkpoint: as ``--resume_from_checkpoint`` names it.
        way_out: what to do then.
    """
    before = _note(folder)
    changed = [name for name in run if name in before and before[name] != run[name]]
    if changed:
        then, now = (", ".join(f"{name} {each[name]}" for name in changed) for each in (before, run))
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: expected in {folder} a run with {now}, got one with {then}. {way_out}"
        )


def begin(folder: Path, run: dict[str, Any]) -> None:
    """Note that `run` is started in `folder`, or goes on there; on the main process."""
    _write(folder, _note(folder) | run)


def begin_anew(folder: Path, run: dict[str, Any], checkpoint: str | None) -> None:
    """Move what the run before wrote out of the way of `run`, which overwrites it, and note that it is started; on the main process.

    A checkpoint that stayed would be taken for the new run's when that is resumed, results would be mixed, and until the new run
    ends, weights and card would be the old one's. Only the checkpoint that the new run goes on from stays where it is, and all
    that no run is known to have written.
    """
    kept = checkpoint and Path(checkpoint).resolve()
    names = [name for name in sorted(_written(folder)) if (folder / name).resolve() != kept]
    if names:
        aside = _new_aside(folder)
        if (folder / RUN).is_file():
            shutil.copyfile(folder / RUN, aside / RUN)
        # Before anything is moved: what a kill leaves behind is not taken for the new run's, nor continued as the old one's.
        _write(folder, run | {MOVING: {"names": names, "to": aside.name}})
        _move(folder, names, aside)
        logger.warning(
            f"--overwrite_output_dir: {len(names)} files and folders of the run before are in {aside} now. Delete it if nobody needs "
            "them."
        )
    _write(folder, run)


@contextmanager
def noted(folder: Path, kind: str = WROTE) -> Iterator[None]:
    """Note which files at the top of `folder` are written in the block; on the main process."""
    before = _files(folder)
    yield
    note, after = _note(folder), _files(folder)
    wrote = {name for name, changed in after.items() if changed != before.get(name)} - {RUN, CARD}
    _write(folder, note | {kind: sorted(wrote.union(note.get(kind, ())))})


def make_way(folder: Path, splits: Collection[str], predictions: Collection[str]) -> None:
    """Move results and predictions aside that are about to be replaced, or are of other weights then; on the main process.

    Args:
        folder: where they are.
        splits: whose results are found anew; with ``"train"`` the weights change, and no result before is theirs.
        predictions: names of files that are written, as far as they are known; those that are noted are known.
    """
    trained = "train" in splits
    names = {f"{split}_results.json" for split in (SPLITS if trained else splits)}
    names |= {*predictions, *(_note(folder).get(PREDICTED, ()) if trained or "test" in splits else ())}
    names = {name for name in names if (folder / name).exists()}
    results = folder / ALL_RESULTS
    before = _results(results)
    kept = {} if trained else {name: each for name, each in before.items() if name.partition("_")[0] not in splits}
    mixed = results.exists() and (kept != before or not before)
    if not (names or mixed):
        return
    aside = _new_aside(folder)
    if mixed:
        shutil.copyfile(results, aside / ALL_RESULTS)
        with in_place_of(results) as partial:
            partial.write_text(json.dumps(kept, indent=4, sort_keys=True), encoding="utf-8")
    _move(folder, names, aside)
    moved = ", ".join(sorted(names | ({ALL_RESULTS} if mixed else set())))
    logger.warning(
        f"{moved} of before are in {aside} now, since new ones are written. Delete it if nobody needs them."
    )


def _results(file: Path) -> dict[str, Any]:
    """What is in a file of results; nothing where it is none, or cut short."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(folder: Path) -> set[str]:
    """Names of what runs wrote into `folder`, as their kind, the note, a card's signature or a checkpoint tells."""
    found = {each.name for name in CHECKPOINTS for each in folder.glob(name)}
    note = _note(folder)
    names = {*RESULTS, *note.get(WROTE, ()), *note.get(PREDICTED, ())}
    # What was killed while it saved its model has not noted it, but a checkpoint has files of the same names.
    names |= {each.name for name in found if (folder / name).is_dir() for each in (folder / name).iterdir()}
    names = names - {CARD} if why_left_alone(folder / CARD) else names | {CARD}
    return found | {name for name in names if (folder / name).is_file()}


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells a file at the top of `folder` from one that was written in its place."""
    files = {each.name: each.stat() for each in folder.iterdir() if each.is_file()} if folder.is_dir() else {}
    return {name: (stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in files.items()}


def _new_aside(folder: Path) -> Path:
    numbers = (each.name.rpartition("-")[2] for each in folder.glob(f"{REPLACED}-*"))
    aside = folder / f"{REPLACED}-{1 + max((int(number) for number in numbers if number.isdigit()), default=0)}"
    aside.mkdir()
    return aside


def _move(folder: Path, names: Iterable[str], aside: Path) -> None:
    """Move those of `names` that are still there."""
    aside.mkdir(exist_ok=True)
    # A note may be from anywhere: nothing outside of the folder is touched.
    for name in (Path(name).name for name in names):
        if (folder / name).exists():
            os.rename(folder / name, aside / name)


def _note(folder: Path) -> dict[str, Any]:
    """What is noted of the last run in `folder`; nothing of one of an earlier version."""
    file = folder / RUN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(folder: Path, note: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with in_place_of(folder / RUN) as partial:
        partial.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
