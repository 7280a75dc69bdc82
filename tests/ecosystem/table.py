"""The page of what was tried: ``python -m tests.ecosystem.table`` writes it, from the cases that the tests prove."""

from __future__ import annotations

import re
from pathlib import Path

from tests.ecosystem import detection_cases, sentence_transformers_cases, trl_cases
from tests.ecosystem.properties import PROPERTIES
from tests.ecosystem.refused_cases import REFUSED
from tests.ecosystem.runs import Case


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tried.md"
LIBRARIES = {
    "transformers": detection_cases.CASES,
    "trl": trl_cases.CASES,
    "sentence-transformers": sentence_transformers_cases.CASES,
}
INTRODUCTION = """\
<!-- Written by `python -m tests.ecosystem.table`. The tests of tests/ecosystem prove every cell. -->

# Tried under the mixin

Trainers of other libraries with `SAMPaMixin` above them, and their arguments with `SAMPaArgumentsMixin`. Each was run
with a small model and made-up data, on CPUs, on one process and on two. The columns:

- **one process = two**: weights, optimizer and every number that is logged of training, the trainer's own among them,
  bit for bit.
- **resumed = never stopped**: a run of two processes that goes on from a checkpoint, bit for bit; **one process
  resumes what two wrote** likewise.
- **best model at the end**: with `load_best_model_at_end`, the best checkpoint's weights are held, where it is not the
  last.
- **loads with the library alone**: what was saved, without `hf_sampa`; it says what the trained model says.
- **rho = lambda = 0 is the library's**: without dropout, the weights of the library's own trainer on one process, bit
  for bit.
"""


def version(library: str) -> str:
    """The version that the tests run with."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(rf"^{library}==(\S+)$", pins, re.MULTILINE)[1]


def row(case: Case) -> str:
    """What was found of a case."""
    cells = [f"no: {case.limits[name]}" if name in case.limits else "yes" for name in PROPERTIES]
    return f"| `{case.plain[0].__name__}` | {case.title} | {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    head = ["trainer", "with", *PROPERTIES]
    parts = [INTRODUCTION]
    for library, cases in LIBRARIES.items():
        lines = [f"## {library} {version(library)}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        parts.append("\n".join([*lines, *map(row, cases)]) + "\n")
    refused = [f"- `{name}` {why}." for name, why in REFUSED.items()]
    parts.append("\n".join(["## Refused", "", "By name, when the trainer is made:", "", *refused]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
