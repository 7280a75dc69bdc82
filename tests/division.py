"""How the suite is divided: ``make test`` shows every property once, ``make test-all`` also what follows from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def divided(values: Iterable[Any], whole: Collection[Any]) -> list[Any]:
    """Values of a parameter, of which those in `whole` are for ``make test-all`` alone."""
    values = list(values)
    assert set(whole) <= set(values)
    return [pytest.param(value, marks=pytest.mark.whole) if value in whole else value for value in values]


def divided_tuples(values: Iterable[tuple], whole: Collection[tuple]) -> list[Any]:
    """`divided`, of several parameters at once."""
    return [pytest.param(*value, marks=pytest.mark.whole) if value in whole else value for value in map(tuple, values)]
