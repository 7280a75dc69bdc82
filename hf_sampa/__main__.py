"""What the package does from the command line: ``python -m hf_sampa``."""

from __future__ import annotations

import sys

from .launch import configurations, described, launch
from .plan import plan


USAGE = """usage: python -m hf_sampa launch script.py   start a script as a SAMPa pair; launch --help has its options
       python -m hf_sampa config [NAME]      print the path of a launch configuration, for accelerate launch
       python -m hf_sampa plan MODEL         what a run needs, and how to start it; plan --help has its options
       python -m hf_sampa.compare CONFIG     several methods, tasks and seeds: which is better, and by how much
       python -m hf_sampa.variants           the catalogue of sharpness-aware methods"""


def main(argv: list[str]) -> None:
    """Run the command line `argv`. Raises SystemExit for one that says something else."""
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "launch":
        launch(rest)
    elif command == "config":
        _show(rest)
    elif command == "plan":
        plan(rest)
    else:
        sys.exit(f"{USAGE}\n\nexpected launch, config or plan, got {command!r}.")


def _show(names: list[str]) -> None:
    known = configurations()
    if not names or names[0] in ("-h", "--help"):
        print(f"python -m hf_sampa config NAME prints the path of one of these:\n{described()}")
    elif len(names) == 1 and names[0] in known:
        print(known[names[0]])
    else:
        sys.exit(f"expected one of {', '.join(known)}, got {' '.join(names)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
