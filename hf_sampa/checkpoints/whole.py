"""Which files of a checkpoint a run cannot go on without, and whether they are whole."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path, PurePosixPath


STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "sampa.safetensors", "sampa_recipe.pt", "sampa_trainer.pt")
# As transformers, peft and sentence-transformers name them, alone or in parts, also in subfolders.
WEIGHTS = re.compile(r"(?:model|pytorch_model|adapter_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself


def is_needed(name: str) -> bool:
    """Whether a run cannot go on without the file with this path in its checkpoint, or another in its place."""
    return name in STATES or is_weights(name)


def is_weights(name: str) -> bool:
    """Whether a file of this path holds weights, or says which files do."""
    return WEIGHTS.fullmatch(PurePosixPath(name).name) is not None


def files_needed(folder: Path) -> dict[str, int]:
    """Sizes of the files that `is_needed` says yes to, by their paths in `folder`."""
    files = [file for file in sorted(folder.rglob("*")) if is_needed(file.relative_to(folder).as_posix())]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def weights_in(folder: Path) -> list[Path]:
    """Files of weights in `folder` and below."""
    return [file for file in sorted(folder.rglob("*")) if is_weights(file.name)]


def problem_of(file: Path, size: int) -> str | None:
    """What is wrong with a file that had `size` bytes when it was saved; None where a run can go on with it.

    A file may have been saved anew in another size, and weights in other files.
    """
    if not file.exists():
        return None if is_weights(file.name) and _other_weights(file.parent) else "it is missing"
    found = file.stat().st_size
    return None if found == size or is_complete(file) else f"it has {found}"


def _other_weights(folder: Path) -> bool:
    """Whether all weights are in the files that there are."""
    for index in folder.glob("*.index.json"):
        if is_weights(index.name) and is_complete(index):
            parts = set(json.loads(index.read_text()).get("weight_map", {}).values())
            return bool(parts) and all((folder / part).exists() and is_complete(folder / part) for part in parts)
    whole = [file for file in folder.iterdir() if is_weights(file.name) and "-of-" not in file.name]
    return bool(whole) and all(is_complete(file) for file in whole)


def is_complete(file: Path) -> bool:
    """Whether a file ends where its own beginning, or its end, says that it does."""
    if file.suffix == ".safetensors":
        return _is_complete_safetensors(file)
    if file.suffix == ".json":
        return _as_json(file.read_bytes()) is not None
    return zipfile.is_zipfile(file)  # what torch.save writes; its table of contents is at the end


def _is_complete_safetensors(file: Path) -> bool:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = _as_json(opened.read(length)) if length <= MOST_HEADER_BYTES else None
    if header is None:
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + length + max(ends, default=0)


def _as_json(text: bytes) -> dict | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
