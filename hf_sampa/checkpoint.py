"""What SAMPa adds to a Trainer checkpoint: g_t, where the data stream is, the settings, and whether it is whole.

Files written after the model, optimizer and scheduler and before ``trainer_state.json``, each put in place by one rename:
``sampa.safetensors`` holds g_t by parameter name, ``sampa_recipe.pt`` the state of the variant, if it has any, and
``sampa.json`` the rest and the sizes of all files so far.
That order makes every cut visible: without a readable ``trainer_state.json`` a checkpoint is torn; with it, but without
``sampa.json``, it is one of plain Trainer; and a file whose size is not the recorded one was cut or replaced.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel


logger = get_logger(__name__)

MANIFEST, TENSORS, RECIPE = "sampa.json", "sampa.safetensors", "sampa_recipe.pt"
TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME
FORMAT = 1


def write(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Add SAMPa's files to the checkpoint in `folder`, whose other files but ``trainer_state.json`` must be there.

    Args:
        folder: the checkpoint.
        tensors: g_t by parameter name; empty where there is none.
        content: anything that JSON holds.
        recipe: state of the recipe: plain values, tensors, and lists and dicts of them.
    """
    partial = folder / f"{TENSORS}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    _put_in_place(partial, folder / TENSORS)
    (folder / RECIPE).unlink(missing_ok=True)
    if recipe:
        partial = folder / f"{RECIPE}.partial"
        torch.save(recipe, partial)
        _put_in_place(partial, folder / RECIPE)
    # Other processes write their random states at this moment; a card is there for people to change. Resuming needs neither.
    left_out = ("rng_state", "README")
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(left_out)]
    manifest = {"format": FORMAT, **content, "files": {file.name: file.stat().st_size for file in files}}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    _put_in_place(partial, folder / MANIFEST)


def _put_in_place(partial: Path, final: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, final)


def invalidate(folder: Path) -> None:
    """Mark `folder` as torn until it is written anew, so that a cut rewrite is not taken for the old checkpoint."""
    for name in (TRAINER_STATE, MANIFEST):
        (folder / name).unlink(missing_ok=True)


def inspect(folder: Path) -> dict[str, Any] | None:
    """Content of the checkpoint in `folder`, or None for one that plain Trainer wrote.

    Raises:
        ValueError: it is no checkpoint, torn, foreign, or of a newer format; the message says which file shows it.
    """
    if not folder.is_dir():
        raise ValueError(f"Expected a checkpoint folder at {folder}, but there is none. Check the path.")
    state = _read_json(folder / TRAINER_STATE)
    if not isinstance(state, dict) or "global_step" not in state:
        raise ValueError(
            f"The checkpoint {folder} is torn or no checkpoint: expected a whole {TRAINER_STATE}, which is written "
            "last. Delete the folder and resume from an earlier one; resume_from_checkpoint=True finds the last whole one."
        )
    if not (folder / MANIFEST).exists() and not (folder / TENSORS).exists():
        return None
    if not (folder / MANIFEST).exists():
        raise ValueError(
            f"The checkpoint {folder} is torn: it has {TENSORS}, but not {MANIFEST}, which belongs to it. Delete the "
            "folder and resume from an earlier one; resume_from_checkpoint=True finds the last whole one."
        )
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"format", "files"} <= manifest.keys():
        raise ValueError(f"{folder / MANIFEST} is foreign: expected a file written by hf_sampa, with a format number.")
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest['format']}, but this hf_sampa reads up to {FORMAT}. Upgrade "
            "hf_sampa to continue from this checkpoint."
        )
    for name, expected in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size != expected:
            found = "it is missing" if size is None else f"it has {size}"
            raise ValueError(
                f"The checkpoint {folder} is torn: expected {name} to have {expected} bytes, but {found}. Delete the "
                "folder and resume from an earlier one; resume_from_checkpoint=True finds the last whole one."
            )
    return manifest


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors that `write` put into `folder`."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe's state that `write` put into `folder`; empty where it had none."""
    file = folder / RECIPE
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
            problems.append(str(problem).partition(" Delete the folder")[0])
        else:
            return folder, problems
    raise ValueError(
        f"resume_from_checkpoint=True expected a whole checkpoint in {output_dir}, but found "
        + (f"only unusable ones: {' '.join(problems)}" if problems else "none. Start without it.")
    )


def load_every_tensor(model: torch.nn.Module, folder: str) -> None:
    """Load the weights in `folder` into `model` by way of `from_pretrained`, which knows renamed keys and tied weights.

    Upstream loads by ``load_state_dict(strict=False)`` and only warns (transformers #43701, #48805): for ViT, whose
    keys are renamed on saving, most tensors would silently stay as they were.

    Raises ValueError where a tensor of the model or of the folder has no counterpart.
    """
    problems: dict[str, Any] = {"reason": "the model is no PreTrainedModel, and its keys differ from the file's"}
    if isinstance(model, PreTrainedModel):
        loaded, info = type(model).from_pretrained(
            folder, config=model.config, dtype=torch.float32, output_loading_info=True
        )
        problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise ValueError(
            f"Expected every tensor of the model in {folder}, and none besides, but got {problems}. These are weights "
            "of another model; load them into the one that wrote them."
        )
    model.load_state_dict(loaded.state_dict())
    logger.info(f"Loaded all {len(loaded.state_dict())} tensors of {folder} by way of from_pretrained.")


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
