"""What SAMPa adds to a Trainer checkpoint: g_t, where the data stream is, the settings, and whether it is whole.

A checkpoint is written in this order, by Trainer unless another is named:

1. ``README.md``, the card (`hf_sampa.cards.publish`);
2. weights and ``training_args.bin``; ``optimizer.pt``, ``scheduler.pt`` and ``scaler.pt``, whole, by rank 0; ``rng_state*.pth``, by all;
3. `write_states`, each file put in place by one rename: ``sampa.safetensors`` has g_t and what else moves besides weights,
   ``sampa_recipe.pt`` the state of the variant and ``sampa_trainer.pt`` what the trainer's own code collected, if there is any;
4. ``trainer_state.json``;
5. `write_manifest`: ``sampa.json``, which says the rest, and the checksums of all these files, once they are on the disk.

That order makes every cut visible: without a readable ``trainer_state.json`` a checkpoint is torn, and so it is with a
``sampa.safetensors``, but without ``sampa.json``; one that has neither of the two is plain Trainer's. The checksums make
visible what happened to it afterwards. `SAMPaMixin._save_rng_state` and `Saving` see to it that 3 and 5 come then.
In parts (`in_parts.py`) weights and optimizer come after the other files of 2, and ``sampa_shards/`` before the others of 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState

from ..files import in_place_of, sync_names
from . import manifest
from .manifest import Manifest, Weights
from .whole import (
    LATER,
    MISSING,
    OTHER,
    can_be_read,
    is_weights,
    needed_in,
    problem_of,
    record,
    refused,
    unreadable,
    weights_in,
)


MANIFEST, TENSORS = "sampa.json", "sampa.safetensors"
RECIPE, COLLECTED = "sampa_recipe.pt", "sampa_trainer.pt"
TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME
# Of tensors in `TENSORS` besides g_t. No parameter's name begins with a dot.
FORWARD_STATE, OTHERS = ".forward_state.", ".others."
ELSEWHERE = "Resume from another one; resume_from_checkpoint=True finds the last whole one."
ON_PURPOSE = "If that was done on purpose, ignore_changed_files=True goes on from it. "


# ---- Writing ----


def write_states(folder: Path, tensors: dict[str, dict[str, Tensor]], states: dict[str, Any] | None = None) -> None:
    """Add what SAMPa has to remember, but for the manifest, to the checkpoint in `folder`.

    Args:
        folder: the checkpoint.
        tensors: by prefix, "" for g_t, and name.
        states: by file name; plain values, tensors, and lists, tuples and dicts of them. What is empty has no file.
    """
    # Copies, where one memory has two names, or only a part of it is meant.
    named = {prefix + name: each for prefix, several in tensors.items() for name, each in several.items()}
    packed = {
        name: each.contiguous() if name[0] != "." else each.clone(memory_format=torch.contiguous_format)
        for name, each in named.items()
    }
    with in_place_of(folder / TENSORS) as partial:
        save_file(packed, partial)
    for name, state in (states or {}).items():
        (folder / name).unlink(missing_ok=True)
        if state:
            with in_place_of(folder / name) as partial:
                torch.save(state, partial)


def write_manifest(folder: Path, content: dict[str, Any], expected: set[str]) -> None:
    """Say that the checkpoint in `folder` is whole, which it is when all else is on the disk.

    Args:
        folder: the checkpoint.
        content: fields of `Manifest`.
        expected: paths in it of files that were written.

    Raises:
        OSError: it cannot be written, or somebody has removed a file meanwhile.
    """
    if missing := sorted(name for name in expected if not (folder / name).exists()):
        raise FileNotFoundError(f"{missing[0]} was removed from {folder} while the checkpoint was written")
    text = manifest.written(manifest.built({**content, "files": record(folder)}))
    with in_place_of(folder / MANIFEST) as partial:
        partial.write_text(text, encoding="utf-8")
    for each in (folder, folder.parent):  # the names of the files, before older checkpoints are removed
        sync_names(each)


# ---- Reading ----


def read(folder: Path) -> Manifest | None:
    """Content of the checkpoint in `folder`, or None for one that plain Trainer wrote. Its other files are not looked at.

    Raises:
        ValueError: it is no checkpoint, torn, foreign, or of a newer format; the message says which file shows it.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[Manifest | None, bool]:
    """`read`, and whether the manifest is as it was written."""
    # What plain Trainer refuses, too, begins with its words.
    if not folder.is_dir():
        raise ValueError(
            f"Can't find a valid checkpoint at {folder}: expected a folder there, but there is none. Check the path."
        )
    if not _is_state(folder / TRAINER_STATE):
        found = "" if weights_in(folder) else f"Can't find a valid checkpoint at {folder}, which holds no weights. "
        raise ValueError(
            f"{found}The checkpoint {folder} is torn or no checkpoint: expected a whole {TRAINER_STATE}, which is written "
            f"after all others but {MANIFEST}. {ELSEWHERE}"
        )
    if not (folder / MANIFEST).is_file():
        ours = [name for name in (TENSORS, RECIPE, COLLECTED) if (folder / name).exists()]
        if not ours:
            return None, True
        raise ValueError(
            f"The checkpoint {folder} is torn: it has {ours[0]}, but not {MANIFEST}, which is written last. {ELSEWHERE}"
        )
    try:
        return manifest.read((folder / MANIFEST).read_bytes())
    except manifest.Foreign as problem:
        raise ValueError(f"{folder / MANIFEST} {problem}. {ELSEWHERE}") from problem
    except ValueError as problem:
        raise ValueError(f"The checkpoint {folder} is damaged: in {MANIFEST}, {problem}. {ELSEWHERE}") from problem


def _is_state(file: Path) -> bool:
    """Whether `file` is a whole ``trainer_state.json``."""
    try:
        step = TrainerState.load_from_json(str(file)).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False
    return type(step) is int and 0 <= step < 2**63


def inspect(
    folder: Path, ignore_changed_files: bool = False, counts: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """Read every file that a run would go on from; what has changed, by file, where changes are ignored.

    Args:
        folder: the checkpoint.
        ignore_changed_files: whether what can be read is enough.
        counts: by the path of a file, whether it matters how it is.

    Raises:
        ValueError: see `read`; or a file is missing, cannot be read, or is not as it was written. The message names it.
    """
    try:
        content, as_written = _read(folder)
        changes = {} if content is None else _changes(folder, content, counts)
        if not as_written:
            changes[MANIFEST] = OTHER
        if changes and not ignore_changed_files:
            way_out = ON_PURPOSE if _can_be_ignored(folder, changes) else ""
            raise ValueError(
                f"The checkpoint {folder} is not as it was written: {listed(changes)}. {way_out}{ELSEWHERE}"
            )
        if not _can_be_ignored(folder, changes):
            raise ValueError(
                f"The checkpoint {folder} cannot be taken as it is, because what has changed is missing or damaged: {listed(changes)}. "
                f"{ELSEWHERE}"
            )
        if changes or content is None or content.format == 1:
            _check(folder, counts, unreadable, "is torn or damaged")
        _check(folder, counts, refused, "cannot be loaded")
        return changes
    except OSError as error:
        raise ValueError(f"The checkpoint {folder} cannot be read: {error}. {ELSEWHERE}") from error


def _changes(folder: Path, content: Manifest, counts: Callable[[str], bool]) -> dict[str, str]:
    found = {name: problem_of(folder, name, kept) for name, kept in content.files.items() if counts(name)}
    changes = {name: problem for name, problem in found.items() if problem}
    # Others would be loaded in the place of those that were written, or beside them.
    added = [name for name in needed_in(folder) if is_weights(name) and name not in content.files and counts(name)]
    return changes | dict.fromkeys(added if content.format > 1 else (), LATER)


def _can_be_ignored(folder: Path, changes: dict[str, str]) -> bool:
    """Whether a run could go on from what there is: other weights may be there, anything else is read as it is named."""
    missing = [name for name, problem in changes.items() if problem == MISSING]
    weights = any(map(is_weights, needed_in(folder))) or not missing
    damaged = [
        name for name in changes if (folder / name).is_file() and can_be_read(name) and unreadable(folder / name)
    ]
    return weights and all(map(is_weights, missing)) and not damaged


def listed(changes: dict[str, str]) -> str:
    """What `inspect` found, in words."""
    return "; ".join(f"{name} {problem}" for name, problem in changes.items())


def _check(folder: Path, counts: Callable[[str], bool], problem_of: Callable[[Path], str | None], words: str) -> None:
    """Raise ValueError where a file that is needed, and counts, has a problem."""
    for name in filter(counts, needed_in(folder)):
        if problem := problem_of(folder / name):
            raise ValueError(f"The checkpoint {folder} {words}: {name} {problem}. {ELSEWHERE}")


def is_whole(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that can be resumed."""
    try:
        inspect(folder)
    except ValueError:
        return False
    return True


def steps_in(output_dir: Path) -> list[str]:
    """Names of the checkpoints in `output_dir`, whole or not, the last first."""
    names = [path.name for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(names, key=lambda name: int(name.partition("-")[2]), reverse=True)


def last_whole(output_dir: Path, names: Iterable[str], inspect: Callable[[Path], Any]) -> tuple[Path, list[str]]:
    """The first of the checkpoints `names` in `output_dir` that `inspect` does not refuse, and what was wrong with those before it.

    Raises ValueError where there is none, naming the torn ones.
    """
    problems = []
    for name in names:
        try:
            inspect(output_dir / name)
        except ValueError as problem:
            problems.append(str(problem).removesuffix(ELSEWHERE).rstrip())
        else:
            return output_dir / name, problems
    raise ValueError(
        f"No valid checkpoint found in output directory ({output_dir}): resume_from_checkpoint=True expected a whole one, but "
        + (f"found only unusable ones: {' '.join(problems)}" if problems else "found none. Start without it.")
    )


# ---- What is in it ----


def recorded_weights(folder: Path) -> Weights | None:
    """What `folder` says of the weights that were saved in it: their names and a fingerprint; None where it says nothing."""
    if not (folder / MANIFEST).exists():
        return None
    return manifest.read((folder / MANIFEST).read_bytes())[0].weights


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that `write_states` put into `folder` under one prefix, without it; by default g_t."""
    if not (folder / TENSORS).exists():
        return {}
    with safe_open(folder / TENSORS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix or "") and (prefix or name[0] != ".")]  # noqa: SIM118 - not a dict
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_state(folder: Path, name: str) -> Any:
    """The state that `write_states` put into `folder` as file `name`; empty where it had none."""
    file = folder / name
    return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}


def changed(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Settings that differ, each as ``name: X in the checkpoint, Y now``."""
    return [
        f"{name}: {expected.get(name)!r} in the checkpoint, {value!r} now"
        for name, value in found.items()
        if expected.get(name) != value
    ]
