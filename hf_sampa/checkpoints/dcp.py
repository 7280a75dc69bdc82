"""The files of `torch.distributed.checkpoint`: what a run needs of them, whether they are whole, and what else they could hold.

A folder of these has a file of every process that wrote, ``__0_0.distcp``, and ``.metadata``, which says what is where. That one is
a pickle, and so are the values in the others that are no tensors. torch loads both without a question: here they are looked at before.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint


MODEL, OPTIMIZER, OWN = f"{FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0", "sampa_shards"
METADATA = ".metadata"
FILES = re.compile(rf"({MODEL}|{OPTIMIZER}|{OWN})/(\.metadata|[^/]+\.distcp)")
# What a `.metadata` consists of, besides torch's dtypes.
_METADATA = "torch.distributed.checkpoint.metadata"
KNOWN = {
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def is_part(name: str) -> bool:
    """Whether a file of this path in a checkpoint is one of these."""
    return FILES.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether it holds weights, or says which files do."""
    return is_part(name) and PurePosixPath(name).parent.name == MODEL


class Foreign(Exception):
    """A name that no ``.metadata`` needs."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise Foreign(f"{module}.{name}")


def _read(file: Path) -> Any:
    """A ``.metadata``. Raises Foreign, and what `pickle` does for what is none."""
    with open(file, "rb") as opened:
        return _Reader(opened).load()


def unreadable(file: Path) -> str | None:
    """What is missing of what a ``.metadata`` names; None where all is there. Raises what `pickle` does where it is damaged."""
    try:
        parts = _read(file).storage_data.values()
    except Foreign:
        return None  # `unsafe` says so
    ends: dict[str, int] = {}
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        other = file.parent / name
        if not other.is_file():
            return f"names {name}, which is missing"
        if other.stat().st_size < end:
            return f"names {end} bytes of {name}, which has {other.stat().st_size}"
    return None


def unsafe(file: Path) -> set[str]:
    """Classes in the values that a ``.metadata`` names, and that torch does not know to be harmless. Raises Foreign for such in itself."""
    return {name for value in _values(file) for name in get_unsafe_globals_in_checkpoint(value)}


def _values(file: Path) -> Iterator[io.BytesIO]:
    """What is no tensor, as torch has saved it."""
    found = _read(file)
    kinds = found.state_dict_metadata
    for index, part in found.storage_data.items():
        if isinstance(kinds[index.fqn], BytesStorageMetadata):
            with open(file.parent / part.relative_path, "rb") as opened:
                opened.seek(part.offset)
                yield io.BytesIO(opened.read(part.length))
