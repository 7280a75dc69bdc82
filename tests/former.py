"""Runs whose checkpoints, of every version that was released, lie in `tests/former/`; and what wrote them.

python -m tests.former      # writes those of this version; what is there is left as the version wrote it that it is of
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sampa import SAMPaTrainer, __version__
from tests import tiny
from tests.ranks import run_ranks


FOLDER = Path(__file__).with_suffix("")
STEPS, SAVED = 5, 3
# What a run does not go on from: the card, and a pickle that knows where it was written.
NOT_NEEDED = ("README.md", "training_args.bin")


def as_before(folder: Path, without: Iterable[str] = ()) -> None:
    """Let the manifest of a checkpoint say of its files, as they are now, what format 1 says: sizes, and no checksum."""
    manifest = json.loads((folder / "sampa.json").read_text())
    files = {name: (folder / name).stat().st_size for name in manifest["files"] if (folder / name).exists()}
    manifest = {name: each for name, each in manifest.items() if name not in (*without, "checksum")}
    (folder / "sampa.json").write_text(json.dumps({**manifest, "format": 1, "files": files}))


class Small(nn.Module):
    """A classifier with running statistics, on a teacher that is frozen and follows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.teacher = nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x, labels):
        inner = self.norm(self.first(x)).tanh()
        logits = self.last(inner)
        with torch.no_grad():
            for own, followed in zip(self.teacher.parameters(), self.last.parameters(), strict=True):
                own.lerp_(followed, 0.1)
        loss = nn.functional.cross_entropy(logits, labels) + (logits - self.teacher(inner)).square().mean()
        return {"loss": loss, "logits": logits}


class Collecting(SAMPaTrainer):
    """With weights of a loss, and numbers that it collects."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.head, self.losses = nn.Linear(2, 1), []

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.add_param_group({"params": list(self.head.parameters())})
        return optimizer

    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        loss = outputs["loss"] + self.head(outputs["logits"]).square().mean()
        self.losses.append(loss.item())
        return loss * (1 + 0.01 * len(self.losses))


RUNS: dict[str, dict[str, Any]] = {
    "sampa": {},
    "sam": {"method": "sam"},
    "sharded": {"shard_optimizer": True, "processes": 2},
    "two pairs": {"processes": 4, "per_device_train_batch_size": 2},
    "shards of mSAM": {"variant": "msam", "variant_args": {"size": 2}},
    "a variant that remembers": {"variant": "vasso"},
    "a loss with weights": {"trainer_class": Collecting},
    "sgd": {"optim": "sgd", "gradient_accumulation_steps": 2},
}


def samples(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(4, generator=generator), "labels": i % 2} for i in range(count)]


def run(folder: Path, name: str, resume: str | None = None) -> dict[str, torch.Tensor]:
    """Final weights."""
    settings = {"trainer_class": SAMPaTrainer, "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED}
    settings |= {key: value for key, value in RUNS[name].items() if key != "processes"}
    return tiny.run(folder, Small(), samples(18), settings.pop("trainer_class"), resume, **settings)["weights"]


def run_as_it_was(folder: Path, name: str, resume: str | None = None) -> dict[str, torch.Tensor]:
    """On as many processes as the run had."""
    processes = RUNS[name].get("processes", 1)
    return (
        run_ranks(run, processes, folder, name, resume, folder=folder)[0]
        if processes > 1
        else run(folder, name, resume)
    )


def write(folder: Path, name: str, tell: Callable[[str], None] = print) -> None:
    """The checkpoint of a run by this version, and the weights that it ends with."""
    kept = FOLDER / __version__ / name.replace(" ", "_")
    if kept.exists():
        return
    weights = run_as_it_was(folder / name, name)
    shutil.copytree(folder / name / f"checkpoint-{SAVED}", kept / f"checkpoint-{SAVED}", ignore=lambda *_: NOT_NEEDED)
    (kept / "ends_with.json").write_text(json.dumps({key: value.tolist() for key, value in weights.items()}))
    tell(f"{kept}")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or RUNS:
            write(Path(folder), name)
