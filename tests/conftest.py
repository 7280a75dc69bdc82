"""What holds for all tests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults import figures


@pytest.fixture(autouse=True, scope="module")
def nothing_older_is_collected():
    """Every run of a Trainer begins with a collection: half a second where it looks at all that has been imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def chosen(request) -> Callable[..., list[Any]]:
    """Of parameters of a module's tests, the values that are to run, so that what tests share is made for these alone."""

    def values(*names: str) -> list[Any]:
        of_module = [
            item.callspec.params
            for item in request.session.items
            if item.module is request.module and hasattr(item, "callspec")
        ]
        found = [tuple(params[name] for name in names) for params in of_module if params.keys() >= set(names)]
        return [each if len(names) > 1 else each[0] for each in dict.fromkeys(found)]

    return values


@pytest.fixture
def figure(record_property) -> Callable[[str, int, int], None]:
    """Report a kind of fault, how many of it were put in, and how many ended as they should: a row of the table at the end."""
    return lambda name, tried, right: record_property(figures.PROPERTY, [name, int(tried), int(right)])


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of `tests/faults`."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    if lines := figures.table(reports):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
