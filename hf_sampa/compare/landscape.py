"""The loss around trained weights: between those of two methods, and along random directions from those of each.

Directions are normalised by filter (Li et al. 2018, arXiv 1712.09913, section 4): Gaussian, every row of a matrix scaled to the length of
the weights' row; biases and norms stay. The script itself computes each loss, on its evaluation data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..files import in_place_of, read_json
from .config import Comparison, as_words
from .holding import held
from .runs import Run


LAST_LINES = 12
FILE = "landscape.json"
WEIGHTS = "model.safetensors"
Weights = dict[str, Tensor]


def measure(comparison: Comparison, runs: Sequence[Run], root: Path, run: bool = True) -> dict[str, Any] | None:
    """What ``landscape.json`` has: losses ``between`` the first and the last method, and ``around`` each, with the places.

    Args:
        comparison: its section landscape says of which task and seed.
        runs: those that are scored; None comes of it while one of these is not done.
        root: of the comparison's files.
        run: whether to compute what is not there.

    Raises:
        RuntimeError: the script could not compute a loss.
    """
    asked = comparison.landscape
    if asked is None:
        return None
    of = {each.method: each for each in runs if (each.task, each.seed) == (asked.task, asked.seed)}
    of = {method: of[method] for method in comparison.methods if method in of and of[method].result(root)}
    if len(of) < len(comparison.methods):
        return None
    job = {
        "script": str(comparison.script.resolve()),
        "arguments": {name: value for name, value in _arguments(comparison).items() if value is not None},
        "folders": {method: str(each.folder(root) / "output") for method, each in of.items()},
        "points": asked.points,
        "directions": asked.directions,
    }
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    if not run:
        return _kept(digest, root)
    with held(root / ".landscape.held"):
        found = _kept(digest, root)
        if found is None:
            found = {"of": digest, **_computed(job, digest, root)}
            with in_place_of(root / FILE) as partial:
                partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _kept(digest: str, root: Path) -> dict[str, Any] | None:
    """What an earlier call computed."""
    file = root / FILE
    found = read_json(file) if file.exists() else {}
    return found if found.get("of") == digest else None


def _computed(job: Mapping[str, Any], digest: str, root: Path) -> dict[str, Any]:
    """`losses` of this job, from where an interrupted call left it."""
    file, log = root / "landscape.jsonl", root / "landscape.log"
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    # What follows the last end of line was being written.
    known = [json.loads(line) for line in lines[1:-1]] if lines[:1] == [digest] else []
    text = "\n".join([digest, *map(json.dumps, known)]) + "\n"
    file.write_text(text, encoding="utf-8")
    with (
        tqdm(total=count_losses(job), initial=len(known), desc="landscape", unit="loss") as bar,
        file.open("a") as kept,
    ):
        # In a process of its own, as the script's modules and what it sets are the script's.
        command = [sys.executable, "-m", "hf_sampa.compare.landscape"]
        with (
            log.open("w") as said,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
            ) as process,
        ):
            process.stdin.write(json.dumps({**job, "known": known}))
            process.stdin.close()
            found = None
            for line in process.stdout:
                found = json.loads(line)
                if not isinstance(found, dict):
                    kept.write(line)
                    kept.flush()
                    bar.update()
    if process.returncode:
        last = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise RuntimeError(
            f"landscape: expected losses of trained models from {job['script']}, got exit code {process.returncode}; the end of {log}:\n{last}\nSet "
            "what it needs to score a folder of trained weights under landscape: arguments (null leaves an argument out)."
        )
    file.unlink()
    return found


def count_losses(job: Mapping[str, Any]) -> int:
    """How many there are to compute."""
    return (1 + len(job["folders"]) * job["directions"]) * (job["points"] // 2 * 2 + 1)


def _arguments(comparison: Comparison) -> dict[str, Any]:
    """With which the script scores trained weights."""
    asked = comparison.landscape
    return {**comparison.arguments, **comparison.tasks[asked.task], "do_train": False, **asked.arguments}


def losses(
    job: Mapping[str, Any],
    loss_at: Callable[[Weights, Path], float],
    tell: Callable[[float], None] = lambda loss: None,
) -> dict[str, Any]:
    """See `measure`.

    Args:
        job: what of; the first losses may be ``known``, in their order.
        loss_at: computes the loss of weights, like those in a folder.
        tell: is given every loss that was computed.
    """
    known = iter(job.get("known", ()))
    folders = {method: Path(folder) for method, folder in job["folders"].items()}
    weights = {method: load_file(folder / WEIGHTS) for method, folder in folders.items()}
    first, *_, last = folders
    half = job["points"] // 2
    way = [i / half - 0.5 for i in range(2 * half + 1)]  # -0.5 to 1.5, with 0 and 1 among them where half is even
    distances = [i / half - 1 for i in range(2 * half + 1)]

    def at(moved: Weights, folder: Path) -> float:
        loss = next(known, None)
        if loss is None:
            tell(loss := loss_at(moved, folder))
        return loss

    between = [at(mixed(weights[first], weights[last], t), folders[first]) for t in way]
    around = {
        method: [
            [at(moved(own, direction, r), folders[method]) for r in distances]
            for direction in random_directions(own, job["directions"])
        ]
        for method, own in weights.items()
    }
    return {"methods": [first, last], "way": way, "between": between, "distances": distances, "around": around}


def mixed(one: Weights, other: Weights, t: float) -> Weights:
    """(1 - t) one + t other; what is no floating point number is `one`'s."""
    return {
        name: torch.lerp(value, other[name], t) if value.is_floating_point() else value for name, value in one.items()
    }


def moved(own: Weights, direction: Weights, distance: float) -> Weights:
    return {name: value + distance * direction[name] if name in direction else value for name, value in own.items()}


def random_directions(own: Weights, count: int) -> Iterator[Weights]:
    """The same ones for all methods, but for the lengths."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        direction = {}
        for name in sorted(own):
            if own[name].is_floating_point() and own[name].ndim > 1:
                drawn = torch.randn(own[name].shape, generator=generator).flatten(1)
                rows = own[name].float().flatten(1).norm(dim=1, keepdim=True)
                drawn *= rows / drawn.norm(dim=1, keepdim=True)
                direction[name] = drawn.view(own[name].shape).to(own[name].dtype)
        yield direction


def main_of(script: Path) -> Callable[[list[str]], dict[str, float]]:
    """A script's ``main``, which takes a command line and gives metrics."""
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def script_at(script: Path, arguments: Mapping[str, Any]) -> Callable[[Weights, Path], float]:
    """What lets the script's ``main`` compute the evaluation loss of weights."""
    main = main_of(script)

    def loss_at(weights: Weights, like: Path) -> float:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            shutil.copytree(like, model, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*", "_*", "*.png"))
            save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
            given = {**arguments, "model_name_or_path": model, "output_dir": Path(folder) / "out"}
            with redirect_stdout(sys.stderr):
                metrics = main([*as_words(given), "--disable_tqdm", "true"])
        found = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("loss")]
        return sum(found) / len(found)

    return loss_at


if __name__ == "__main__":
    given = json.load(sys.stdin)

    def say(what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    say(losses(given, script_at(Path(given["script"]), given["arguments"]), say))
