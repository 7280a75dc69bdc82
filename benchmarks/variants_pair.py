"""Seconds per step of parallel variants on two processes, the fastest of some rounds; started by variants.py under torchrun.

Usage: variants_pair.py FOLDER EPOCHS NAME ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from variants_worker import run

from hf_sampa.variants import VARIANTS


ROUNDS = 3


def main() -> None:
    """Run each variant in turn, once more than is measured, so that the first round is as warm as the others."""
    folder, epochs, *names = sys.argv[1:]
    found: dict[str, list[dict]] = {name: [] for name in names}
    for each in range(ROUNDS + 1):
        for name in names if each else names[:1]:
            job = {"method": "sampa", "variant": name, "rho": VARIANTS[name].rho, "seed": 0, "epochs": int(epochs)}
            result = run(job)
            if each:
                found[name].append(result)
    for name, results in found.items() if os.environ["RANK"] == "0" else ():
        seconds = min(result["seconds_per_step"] for result in results)
        content = {**results[0], "seconds_per_step": seconds, "rounds": [r["seconds_per_step"] for r in results]}
        (Path(folder) / f"pair-{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
