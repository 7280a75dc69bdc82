"""What the tests of `tests/faults` tried and found, as a table at the end of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


PROPERTY = "fault"


def table(reports: Iterable[Any]) -> list[str]:
    """Lines of the table, from pytest's reports: by name, how many faults were put in and how many ended as they should."""
    tried, right = Counter(), Counter()
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY and report.when == "call":
                tried[value[0]] += value[1]
                right[value[0]] += value[2]
    if not tried:
        return []
    width = max(map(len, tried))
    head = f"{'fault':{width}}  tried  as it should be"
    return [head, *(f"{name:{width}}  {count:5d}  {right[name]:15d}" for name, count in sorted(tried.items()))]
