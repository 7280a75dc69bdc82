"""Seconds per step of parallel variants on two processes; started by variants.py under torchrun.

Usage: variants_pair.py FOLDER EPOCHS NAME ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from variants_worker import run

from hf_sampa.variants import VARIANTS


def main() -> None:
    """Run each variant once more than is measured, so that the first one is as warm as the others."""
    folder, epochs, *names = sys.argv[1:]
    for i, name in enumerate([names[0], *names]):
        job = {"method": "sampa", "variant": name, "rho": VARIANTS[name].rho, "seed": 0, "epochs": int(epochs)}
        result = run(job)
        if i and os.environ["RANK"] == "0":
            (Path(folder) / f"pair-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
