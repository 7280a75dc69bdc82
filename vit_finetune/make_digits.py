r"""Write a small image data set that needs no network: the 1797 handwritten digits of 8 x 8 grey values of scikit-learn.

    python vit_finetune/make_digits.py --output_dir out/digits
    python vit_finetune/run_vit.py --train_dir out/digits/train --validation_dir out/digits/validation \
        --from_scratch --image_size 8 --patch_size 4 --hidden_size 64 --num_hidden_layers 2 --augment false \
        --learning_rate 1e-3 --num_train_epochs 10 --output_dir out/digits-sampa

1000 images to train on and 797 to score, as PNG files in a folder for each digit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def make_digits(folder: Path) -> None:
    """Write ``train/`` and ``validation/`` into `folder`, the same files every time."""
    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    parts = train_test_split(np.arange(len(images)), test_size=797, random_state=0, stratify=digits.target)
    for name, part in zip(("train", "validation"), parts, strict=True):
        for i in part:
            place = folder / name / str(digits.target[i])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(place / f"{i:04}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="where to write the images")
    folder = parser.parse_args(argv).output_dir
    make_digits(folder)
    print(f"Wrote 1000 training and 797 validation images to {folder}.")


if __name__ == "__main__":
    main()
