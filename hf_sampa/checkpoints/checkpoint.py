"""What SAMPa adds to a Trainer checkpoint: g_t, where the data stream is, the settings, and whether it is whole.

A checkpoint is written in this order, by Trainer unless another is named:

1. ``README.md``, the card (`hf_sampa.cards.publish`);
2. weights and ``training_args.bin``; ``optimizer.pt``, ``scheduler.pt`` and ``scaler.pt``, whole, by rank 0; ``rng_state*.pth``, by all;
3. what `write` adds, each put in place by one rename: ``sampa.safetensors`` has g_t and what else moves besides weights,
   ``sampa_recipe.pt`` the state of the variant and ``sampa_trainer.pt`` what the trainer's own code collected, if there is any,
   and last ``sampa.json`` the rest, and the sizes of all files that resuming needs;
4. ``trainer_state.json``.

That order makes every cut visible: without a readable ``trainer_state.json`` a checkpoint is torn; with it, but without
``sampa.json``, it is one of plain Trainer. `SAMPaMixin._save_rng_state` sees to it that 3 comes then.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .whole import files_needed, is_needed, problem_of, weights_in


MANIFEST, TENSORS = "sampa.json", "sampa.safetensors"
RECIPE, COLLECTED = "sampa_recipe.pt", "sampa_trainer.pt"
TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME
FORMAT = 1
# Of tensors in `TENSORS` besides g_t. No parameter's name begins with a dot.
FORWARD_STATE, OTHERS = ".forward_state.", ".others."
ELSEWHERE = "Resume from another one; resume_from_checkpoint=True finds the last whole one."


def write(
    folder: Path, tensors: dict[str, dict[str, Tensor]], content: dict[str, Any], states: dict[str, Any] | None = None
) -> None:
    """Add SAMPa's files to the checkpoint in `folder`, whose other files but ``trainer_state.json`` must be there.

    Args:
        folder: the checkpoint.
        tensors: by prefix, "" for g_t, and name.
        content: anything that JSON holds.
        states: by file name; plain values, tensors, and lists, tuples and dicts of them. What is empty has no file.
    """
    partial = folder / f"{TENSORS}.partial"
    # Copies, where one memory has two names, or only a part of it is meant.
    named = {prefix + name: each for prefix, several in tensors.items() for name, each in several.items()}
    save_file({name: each.contiguous() if name[0] != "." else each.clone() for name, each in named.items()}, partial)
    _put_in_place(partial, folder / TENSORS)
    for name, state in (states or {}).items():
        (folder / name).unlink(missing_ok=True)
        if state:
            partial = folder / f"{name}.partial"
            torch.save(state, partial)
            _put_in_place(partial, folder / name)
    manifest = {"format": FORMAT, **content, "files": files_needed(folder)}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    _put_in_place(partial, folder / MANIFEST)


def _put_in_place(partial: Path, final: Path) -> None:
    with open(partial, "r+b") as file:  # Windows syncs nothing that was opened for reading
        os.fsync(file.fileno())
    os.replace(partial, final)


def inspect(folder: Path) -> dict[str, Any] | None:
    """Content of the checkpoint in `folder`, or None for one that plain Trainer wrote.

    Raises:
        ValueError: it is no checkpoint, torn, foreign, or of a newer format; the message says which file shows it.
    """
    # What plain Trainer refuses, too, begins with its words.
    if not folder.is_dir():
        raise ValueError(
            f"Can't find a valid checkpoint at {folder}: expected a folder there, but there is none. Check the path."
        )
    state = _read_json(folder / TRAINER_STATE)
    if not isinstance(state, dict) or "global_step" not in state:
        found = "" if weights_in(folder) else f"Can't find a valid checkpoint at {folder}, which holds no weights. "
        raise ValueError(
            f"{found}The checkpoint {folder} is torn or no checkpoint: expected a whole {TRAINER_STATE}, which is written "
            f"last. {ELSEWHERE}"
        )
    if not (folder / MANIFEST).exists() and not (folder / TENSORS).exists():
        return None
    if not (folder / MANIFEST).exists():
        raise ValueError(
            f"The checkpoint {folder} is torn: it has {TENSORS}, but not {MANIFEST}, which belongs to it. {ELSEWHERE}"
        )
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"format", "files"} <= manifest.keys():
        raise ValueError(f"{folder / MANIFEST} is foreign: expected a file written by hf_sampa, with a format number.")
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest['format']}, but this hf_sampa reads up to {FORMAT}. Upgrade "
            "hf_sampa to continue from this checkpoint."
        )
    # Earlier versions listed all files.
    for name, expected in manifest["files"].items():
        if is_needed(name) and (problem := problem_of(folder / name, expected)):
            raise ValueError(
                f"The checkpoint {folder} is torn: expected {name} to have {expected} bytes, but {problem}. {ELSEWHERE}"
            )
    return manifest


def is_whole(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that can be resumed."""
    try:
        inspect(folder)
    except ValueError:
        return False
    return True


def recorded_weights(folder: Path) -> dict[str, Any] | None:
    """What `folder` says of the weights that were saved in it: their names and a fingerprint; None where it says nothing."""
    manifest = _read_json(folder / MANIFEST)
    return manifest.get("weights") if isinstance(manifest, dict) else None


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that `write` put into `folder` under one prefix, without it; by default g_t."""
    if not (folder / TENSORS).exists():
        return {}
    with safe_open(folder / TENSORS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix or "") and (prefix or name[0] != ".")]  # noqa: SIM118 - not a dict
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_state(folder: Path, name: str) -> Any:
    """The state that `write` put into `folder` as file `name`; empty where it had none."""
    file = folder / name
    return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}


def last_whole(output_dir: Path) -> tuple[Path, list[str]]:
    """Whole checkpoint with the highest step in `output_dir`, and what was wrong with those above it.

    Raises ValueError where there is none, naming the torn ones.
    """
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    problems = []
    for folder in sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            inspect(folder)
        except ValueError as problem:
            problems.append(str(problem).removesuffix(ELSEWHERE).rstrip())
        else:
            return folder, problems
    raise ValueError(
        f"No valid checkpoint found in output directory ({output_dir}): resume_from_checkpoint=True expected a whole one, but "
        + (f"found only unusable ones: {' '.join(problems)}" if problems else "found none. Start without it.")
    )


def changed(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Settings that differ, each as ``name: X in the checkpoint, Y now``."""
    return [
        f"{name}: {expected.get(name)!r} in the checkpoint, {value!r} now"
        for name, value in found.items()
        if expected.get(name) != value
    ]


def _read_json(file: Path) -> Any:
    """Content of a JSON file, None where it is missing or cut."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
