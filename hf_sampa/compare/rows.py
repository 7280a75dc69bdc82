"""Every run as one row: what the tables and pictures are made of, as CSV and as a `datasets` table."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import in_place_of
from .config import as_text
from .runs import TIME, Run


# Columns of what `DiagnosticsCallback` logged last, with its names.
MEASURED = {
    "sharpness": "held_out_sharpness",
    "hessian_eigenvalue": "hessian_eigenvalue",
    "displacement_length": "displacement_length",
    "displacement_cosine": "displacement_cosine",
}
COLUMNS = (
    "phase", "task", "method", "seed", "values", "metric", "score", "loss", *MEASURED, "epochs", "seconds_per_step", "seconds", "launch", "commit", "python", "torch", "transformers", "accelerate", "command", "folder",
)  # fmt: skip


def rows(runs: Iterable[Run], script: Path, root: Path) -> list[dict[str, Any]]:
    """Of those that are done, in their order; with the course of the score under ``course``, which is no column.

    Their commands are as from the current folder.
    """
    script = os.path.relpath(script)
    return [_row(run, script, result, root) for run in runs if (result := run.result(root)) is not None]


def _row(run: Run, script: str, result: dict[str, Any], root: Path) -> dict[str, Any]:
    metrics, versions = result["metrics"], result["versions"]
    return {
        "phase": run.phase,
        "task": run.task,
        "method": run.method,
        "seed": run.seed,
        "values": as_text(run.values),
        "metric": run.metric,
        "score": None if run.phase == TIME else run.score(root),
        "loss": _number(metrics.get("eval_loss")),
        **{column: _number(metrics.get(name)) for column, name in MEASURED.items()},
        "epochs": metrics.get("epoch"),
        "seconds_per_step": result["seconds_per_step"],
        "seconds": result["seconds"],
        "launch": run.launch,
        "commit": result["commit"],
        "python": result["python"],
        **{name: versions[name] for name in ("torch", "transformers", "accelerate")},
        "command": f"python -m hf_sampa launch --config {run.launch} {script} {as_text({**run.arguments, 'seed': run.seed})}",
        "folder": str(run.folder(root).relative_to(root)),
        "course": run.course(root),
    }


def _number(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def write_csv(found: Iterable[dict[str, Any]], file: Path) -> None:
    """A line for each row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    with in_place_of(file) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


def write_dataset(found: Iterable[dict[str, Any]], file: Path) -> None:
    """The same as a Parquet file, for `datasets.Dataset.from_parquet`, with the courses."""
    from datasets import Dataset  # which takes seconds to import

    with in_place_of(file) as partial:
        Dataset.from_list(list(found)).to_parquet(partial)
