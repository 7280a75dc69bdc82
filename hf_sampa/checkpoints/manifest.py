"""What ``sampa.json`` says: its fields with their kinds and ranges, how it is written, and how it is read."""
# Without `from __future__ import annotations`: `strict` checks by the annotations, and takes them as they are.

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, get_args, get_origin

import xxhash
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError


# 1: sizes of the files that resuming needs, in a manifest that is written before trainer_state.json.
# 2: checksums of all files, of trainer_state.json and the manifest itself, too, which is written last.
FORMAT = 2


def _count(value: int) -> None:
    if isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a whole number of at least 0, got {value!r}")


def count(**kwargs) -> Any:
    return validated_field(_count, **kwargs)


@strict
@dataclass
class Recorded:
    """A file as it was written; its checksum is not known in format 1."""

    bytes: int = count()
    xxh3_128: str | None = None


@strict
@dataclass
class Position:
    """Where the data go on, with the fingerprints of the next update batch by replica, where it is known."""

    epoch: int = count()
    start: int = count()
    fingerprints: list[int] | None = None


@strict
@dataclass
class Ascent:
    """What is known of g_t besides its numbers: see `hf_sampa.engine.passes.Pass`."""

    loss: float | int
    norm: float | int
    dot: float | int
    fingerprints: list[int]
    used: list[bool]
    model_norm: float | int | None = None


@strict
@dataclass
class Skipped:
    """Steps that were skipped, of all and at the end."""

    steps: int = count()
    in_a_row: int = count()


@strict
@dataclass
class Means:
    """Sums since the last log line."""

    sums: dict[str, float | int]
    steps: dict[str, int] | int  # one number for all, in checkpoints from before variants
    skipped_steps: int = count()


@strict
@dataclass
class Unlogged:
    """What the next log line takes up."""

    loss: float | int
    means: Means
    since_step: int = count()


@strict
@dataclass
class Weights:
    """Which weights were saved."""

    names: list[str]
    fingerprint: int | None


@strict
@dataclass
class Evaluated:
    """See `hf_sampa.cards.evaluations.Evaluation`."""

    line: int
    step: int = count()
    prefix: str = "eval"
    name: str | None = ""
    other: dict[str, str | None] = field(default_factory=dict)
    samples: int | None = None


def _file_names(value: dict[str, Any]) -> None:
    for name in value:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or any(len(each) > 255 for each in path.parts):
            raise ValueError(f"expected paths of files in the checkpoint, got {name[:50]!r}")


@strict
@dataclass
class Manifest:
    """Content of ``sampa.json``. What has a default is not in every checkpoint of format 1.

    Attributes:
        settings: rho, lambda and method; a change is a warning.
        stream: what decides which samples are in B_t.
        position: where the data go on.
        skipped, unlogged: counts and sums that go on.
        files: every file of the checkpoint but the card, by its path.
        ascent: of g_t; None without one.
        recipe, optimizer: what the step is made of.
        computation: all that decides what is computed, as the card says it.
        continued: sentences on earlier parts of the run.
        evaluations: results so far.
        plain_steps: how many of the steps so far were the base optimizer's alone; None where that was not kept.
        moving: names of buffers that forward moves; None where it was not known yet.
        weights: which were saved.
        kept: "weights", where nothing else was.
        format: see `FORMAT`.
    """

    settings: dict[str, Any]
    stream: dict[str, Any]
    position: Position
    skipped: Skipped
    unlogged: Unlogged
    files: dict[str, Recorded] = validated_field(_file_names)
    ascent: Ascent | None = None
    recipe: dict[str, Any] | None = None
    optimizer: str | None = None
    computation: dict[str, str] | None = None
    continued: list[str] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    plain_steps: int | None = None
    moving: list[str] | None = None
    weights: Weights | None = None
    kept: str | None = None
    format: int = FORMAT


# ---- As text ----


def written(content: Manifest) -> str:
    """The text of ``sampa.json``, with its own checksum."""
    found = dataclasses.asdict(content)
    return json.dumps({**found, "checksum": _checksum(found)}, indent=2) + "\n"


def read(text: bytes) -> tuple[Manifest, bool]:
    """What a text says, and whether it is as it was written, as far as its format can tell.

    Raises:
        Foreign: it is not what `written` gives, in any format.
        ValueError: a field is missing, or of another kind; the message names it.
    """
    found = _parsed(text)
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise Foreign("is foreign: expected a file written by hf_sampa, with a format number")
    if found["format"] > FORMAT:
        raise Foreign(
            f"has format {found['format']}, but this hf_sampa reads up to {FORMAT}. Upgrade hf_sampa to continue from this checkpoint"
        )
    first = found["format"] == 1
    as_written = first or found.pop("checksum", None) == _checksum(found)
    if first and isinstance(found.get("files"), dict):
        found["files"] = {name: {"bytes": size} for name, size in found["files"].items()}
        found["ascent"] = found.get("ascent") or None
    try:
        return built(found), as_written
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error


def built(content: dict[str, Any]) -> Manifest:
    """Of plain values, by the names of its fields. Raises TypeError or StrictDataclassError where they are of another kind."""
    return _built(Manifest, content)


class Foreign(ValueError):
    """No version of this package, or only a newer one, has written it."""


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # nested deeper than Python reads
        return None


def _checksum(found: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(found).encode()).hexdigest()


def _built(kind: Any, value: Any) -> Any:
    """`value`, of plain values, with the dataclasses that `kind` is or holds; other kinds are `strict`'s to check."""
    if isinstance(value, tuple):
        value = list(value)  # as JSON has it
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = {each.name: each.type for each in dataclasses.fields(kind)}
        _check_names(value.keys(), kind)
        return kind(**{name: _built(kinds.get(name), each) for name, each in value.items()})
    inner = next((each for each in get_args(kind) if dataclasses.is_dataclass(each)), None)
    if inner is None:
        return value
    if isinstance(value, list):
        return [_built(inner, each) for each in value]
    if isinstance(value, dict) and get_origin(kind) is dict:
        return {name: _built(inner, each) for name, each in value.items()}
    return _built(inner, value)


def _check_names(names: Iterable[str], kind: Any) -> None:
    fields = {each.name: each for each in dataclasses.fields(kind)}
    needed = {name for name, each in fields.items() if each.default is each.default_factory is dataclasses.MISSING}
    for what, found in {"lacks": needed - set(names), "knows nothing of": set(names) - fields.keys()}.items():
        if found:
            raise TypeError(f"{kind.__name__} {what} {', '.join(sorted(found))}")
