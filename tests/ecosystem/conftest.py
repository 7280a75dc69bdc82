"""The runs that the tests of a case share, and the cases as parameters."""

from __future__ import annotations

import shutil
from contextlib import suppress

import pytest

from tests.ecosystem import models, runs
from tests.ecosystem.properties import PROPERTIES
from tests.ranks import RankFailed, run_ranks


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        column = next((name for name, test in PROPERTIES.items() if test is metafunc.function), None)
        params = [pytest.param(each, id=each.name, marks=marks(each, column)) for each in metafunc.module.CASES]
        metafunc.parametrize("case", params, scope="module")


def marks(case, column):
    """Of a test that is known to fail, so that a limit which is one no longer does not stay in the table; and of `whole`."""
    limit = [pytest.mark.xfail(reason=case.limits[column], strict=True)] if column in case.limits else []
    return limit + [pytest.mark.whole] * case.whole


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A folder with every model to start from."""
    folder = tmp_path_factory.mktemp("models")
    models.write(folder)
    return folder


@pytest.fixture(scope="module")
def written(case, tmp_path_factory):
    """Where two processes write."""
    folder = tmp_path_factory.mktemp("two")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def two(case, start, written):
    """What two processes found, by rank."""
    return run_ranks(runs.on_two, 2, case, start, written, folder=written / "ranks", timeout=120)


@pytest.fixture(scope="module")
def one(case, start, written, request, tmp_path_factory):
    """What one process found, whatever became of two."""
    with suppress(RankFailed):
        request.getfixturevalue("two")
    folder = tmp_path_factory.mktemp("one")
    yield run_ranks(runs.on_one, 1, case, start, folder, written, folder=folder / "ranks", timeout=120)[0]
    shutil.rmtree(folder)
