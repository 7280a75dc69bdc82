"""Write the images of a folder once more, each turned by a quarter to the left, for a second task of the same kind.

python benchmarks/evidence/turn.py out/digits out/digits-turned
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with PNG files, in folders or not")
    parser.add_argument("target", type=Path, help="folder to write, with the same names in it")
    options = parser.parse_args(argv)
    files = sorted(options.source.rglob("*.png"))
    if not files:
        parser.error(f"source: expected a folder with PNG files, got {options.source}, where there are none.")
    for file in files:
        place = options.target / file.relative_to(options.source)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(place)
    print(f"Wrote {len(files)} images to {options.target}.")


if __name__ == "__main__":
    main()
