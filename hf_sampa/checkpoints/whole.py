"""Whether the files of a checkpoint are as they were written: their checksums, and what can be read of those that have none."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals

from ..compat import numpy_by_both_names
from ..files import sync
from . import dcp
from .manifest import Recorded


WEIGHT_AVERAGE = "weight_average.safetensors"  # of a run with one
STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "sampa.safetensors", "sampa_recipe.pt", "sampa_trainer.pt")
STATES += (WEIGHT_AVERAGE,)
RANDOM_STATES = re.compile(r"rng_state(?:_\d+)?\.pth")
# As transformers, peft and sentence-transformers name them, alone or in parts, also in subfolders.
WEIGHTS = re.compile(r"(?:model|pytorch_model|adapter_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
# People write them anew, and no run reads them.
CARD = "README.md"
CHUNK = 2**20
# What readers of JSON, zip archives, pickles and safetensors raise where a file is not what they expect. Not all errors: one of
# our own would make every checkpoint a damaged one.
DAMAGE = (
    *(
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        struct.error,
    ),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, SafetensorError),
)
OTHER, MISSING, LATER = "has another content than what was written", "is missing", "was put there later"


def is_needed(name: str) -> bool:
    """Whether a run cannot go on without the file with this path in its checkpoint."""
    return name in STATES or RANDOM_STATES.fullmatch(name) is not None or is_weights(name) or dcp.is_part(name)


def is_weights(name: str) -> bool:
    """Whether a file of this path holds weights, or says which files do."""
    return WEIGHTS.fullmatch(PurePosixPath(name).name) is not None or dcp.is_weights(name)


def weights_in(folder: Path) -> list[Path]:
    """Files of weights in `folder` and below."""
    return [file for file in sorted(folder.rglob("*")) if is_weights(file.relative_to(folder).as_posix())]


def needed_in(folder: Path) -> list[str]:
    """Paths of the files in `folder` and below that a run needs."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [name for file in files if is_needed(name := file.relative_to(folder).as_posix())]


def record(folder: Path) -> dict[str, Recorded]:
    """Every file of the checkpoint in `folder` but the card, by its path in it; synced to the disk."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    kept = {name: file for name, file in files.items() if name != CARD}
    with ThreadPoolExecutor(1) as waiting:  # for the disk, while checksums are computed
        synced = waiting.map(sync, kept.values())
        found = {name: recorded(file) for name, file in kept.items()}
        list(synced)
    return found


def recorded(file: Path) -> Recorded:
    """A file as it is now."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
        return Recorded(opened.tell(), digest.hexdigest())


def problem_of(folder: Path, name: str, kept: Recorded) -> str | None:
    """What is wrong with a file of the checkpoint in `folder` that was once as `kept` says; None where a run can go on with it."""
    file = folder / name
    if not is_needed(name) and (not file.is_file() or kept.xxh3_128 is None):
        return None
    if not file.is_file():
        return MISSING
    size = file.stat().st_size
    if size != kept.bytes:
        return f"has {size} bytes, where {kept.bytes} were written"
    return None if kept.xxh3_128 is None or recorded(file) == kept else OTHER


def can_be_read(name: str) -> bool:
    """Whether `unreadable` knows the format of a file of this name."""
    return is_needed(name) or name.endswith(".json")


def unreadable(file: Path) -> str | None:
    """What is wrong with a file whose checksum is not known, as far as its own format tells; None where nothing is."""
    try:
        if file.name == dcp.METADATA:
            return dcp.unreadable(file)
        if file.suffix == ".distcp":
            return None  # `.metadata` says what is to be in it
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return None  # its header says where the file is to end, and it does
        if file.suffix == ".json":
            found = json.loads(file.read_bytes())
            parts = found["weight_map"].values() if is_weights(file.name) else ()
            missing = [name for name in parts if not (file.parent / name).is_file()]
            return f"names {missing[0]}, which is missing" if missing else None
        elif not zipfile.is_zipfile(file):
            torch.load(file, map_location="meta", weights_only=True)  # as torch wrote before 1.6
        else:
            with zipfile.ZipFile(file) as archive:
                # torch writes a checksum of every record, unless it was told not to.
                damaged = archive.testzip() if any(each.CRC for each in archive.infolist()) else None
            if damaged:
                return f"is damaged, in its record {damaged}"
    except DAMAGE as error:
        return f"is damaged: {type(error).__name__} while it was read"
    return None


def refused(file: Path) -> str | None:
    """What torch would not load of a file, though it be whole: classes that are not known to be harmless."""
    of_parts = file.name == dcp.METADATA
    if not of_parts and (file.suffix not in (".pt", ".pth", ".bin") or not zipfile.is_zipfile(file)):
        return None
    try:
        with safe_globals(), numpy_by_both_names():  # as Trainer does, for numpy's random state
            names = dcp.unsafe(file) if of_parts else get_unsafe_globals_in_checkpoint(str(file))
    except dcp.Foreign as foreign:
        return f"names {foreign}, which has no place in such a file, and which torch would load"
    return names and (
        f"holds {', '.join(sorted(names))}, which torch.load takes for unsafe. If you know that it is safe, name it to "
        "torch.serialization.add_safe_globals before train()"
    )
