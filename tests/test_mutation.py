"""The script that changes the package and sees which test notices: what it changes, what it finds, what it leaves alone."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.mutation import noticing
from tests.mutation.changes import Change, changes_of, sample, sources
from tests.mutation.copies import HANG, Copy
from tests.mutation.noticing import ROOMS, check_unchanged, measure, notice, quick_and_slow, split, work
from tests.mutation.reach import instrumented, reached
from tests.mutation.reasons import REASONS
from tests.project import PYPROJECT


SOURCE = '''"""About 1 thing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from one import Two

__all__ = ["f"]
LIMIT = 3


def f(x: "int | None", y: float = 0.5) -> "int | None":
    """More than 2 words."""
    if x is None or not y:
        raise ValueError(f"{x + 1} is wrong")
    logger.info("%d", 7)
    assert x < 4
    for each in zip([x], [y], strict=True):
        if each:
            break
    self.kept = x
    done(x)
    return [a for a in (x, -y) if a <= LIMIT]
'''
CHANGES = {
    "3 -> 4",
    "0.5 -> 1.0",
    "x is None or not y -> True",
    "x is None or not y -> False",
    "x is None or not y -> (x is None and (not y))",
    "x is None -> (x is not None)",
    "not y -> y",
    "raise ValueError(...) -> pass",
    "each -> True",
    "each -> False",
    "break -> pass",
    "self.kept = x -> pass",
    "done(x) -> pass",
    "return [a for a in (x, -y) if a <= LIMIT] -> return None",
    "a <= LIMIT -> True",
    "a <= LIMIT -> (a < LIMIT)",
    "a <= LIMIT -> (a > LIMIT)",
    "-y -> y",
}


def test_it_changes_what_decides_and_leaves_alone_what_is_for_people():
    found = changes_of("one.py", SOURCE)
    assert {change.what for change in found} == CHANGES and len(found) == len(CHANGES)


def test_a_change_changes_its_own_place_only():
    for change in changes_of("one.py", SOURCE):
        before, after = SOURCE.splitlines(), change.applied(SOURCE).splitlines()
        first, last = change.lines
        assert before[: first - 1] == after[: first - 1] and before[last:] == after[len(after) - len(before) + last :]
        compile(change.applied(SOURCE), "one.py", "exec")


def test_equal_changes_of_equal_lines_have_names_of_their_own():
    keys = [change.key for change in changes_of("one.py", "x = 1\nx = 1\nx = [1, 1]\n")]
    assert len(set(keys)) == 4


def test_a_sample_is_spread_over_the_modules_and_a_larger_one_holds_it():
    many, few = (
        [Change(path, (1, 1), None, 0, 0, "", str(i), "") for i in range(n)] for path, n in (("a", 90), ("b", 10))
    )
    of_modules = {"a": many, "b": few}
    chosen = sample(of_modules, 20, 1)
    assert [sum(change.path == path for change in chosen) for path in "ab"] == [18, 2]
    assert set(chosen) < set(sample(of_modules, 40, 1)) and chosen != sample(of_modules, 20, 2)


def test_the_package_has_enough_to_change():
    package = Path(__file__).parents[1] / "hf_sampa"
    of_modules = {path: changes_of(path, text) for path, text in sources(package, ROOMS).items()}
    chosen = sample(of_modules, 150, 1)
    assert len(chosen) >= 150
    for change in chosen:
        compile(change.applied((package / change.path).read_text()), change.path, "exec")


def test_reasons_are_of_changes_that_there_are():
    package = Path(__file__).parents[1] / "hf_sampa"
    keys = {change.key for path, text in sources(package, ROOMS).items() for change in changes_of(path, text)}
    assert REASONS.keys() <= keys and all(REASONS.values())


def test_quick_tests_that_run_much_of_the_module_are_tried_first():
    change = Change("engine/one.py", (3, 3), (2, 5), 0, 0, "", "", "")

    def test(seconds, *lines):
        return {"seconds": seconds, "lines": {"engine/one.py": list(lines)}}

    tests = {
        "a.py::slow": test(60.0, 2, 3, 4, 5),
        "a.py::quick[0]": test(0.1, 2, 3),
        "a.py::quick[1]": test(0.2, 2, 3),
        "a.py::quick[2]": test(2.0, 2, 3),
        "b.py::much": test(3.0, 2, 3, 4, 5, 6, 7, 8),
        "c.py::elsewhere": test(0.1, 2, 4),
    }
    assert split(change, tests) == (
        ["a.py::quick[0]", "a.py::quick[1]", "b.py::much"],
        ["a.py::slow", "a.py::quick[2]"],
    )


MODULE = """
def larger(a, b):
    return a if a > b else b


def forever():
    ready = True
    while not ready:
        pass
"""
HANGS = ("True -> False", "not ready -> ready")
TESTS = """
from package.engine.one import forever, larger


def test_larger():
    assert larger(1, 2) == 2


def test_forever():
    forever()
"""


def try_all(project: Path, place: Path) -> tuple[dict[str, str], dict[str, list[int]], str]:
    """What the tests of `project` notice of each change; the lines of its module that each of them runs; a refusal."""
    noticing.WITH_PROCESSES = {}
    copies = [Copy(project, place / str(i)) for i in range(2)]
    path, file, found = "engine/one.py", "test_one.py", {}
    for text in (instrumented(path, MODULE), MODULE):
        copies[0].write(f"package/{path}", text)
        work(copies[:1], [measure(file, place, "now")] if text != MODULE else [])
    tests = reached(file, place, "now")
    assert reached(file, place, "later") is None
    for hangs in (False, True):
        noticing.TO_BEGIN = 4 if hangs else 100
        jobs = [
            notice(
                change,
                MODULE,
                quick_and_slow(change, tests)[0],
                "package",
                lambda noticed, _, what=change.what: found.update({what: noticed}),
            )
            for change in changes_of(path, MODULE)
            if hangs == (change.what in HANGS)
        ]
        work(copies, jobs)
    copies[0].write(file, TESTS + "    assert False")
    with pytest.raises(RuntimeError) as refused:
        work(copies[:1], [check_unchanged(([file], 1, "not distributed"))])
    return found, {test: of["lines"][path] for test, of in tests.items()}, str(refused.value)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    (project / "package/engine").mkdir(parents=True)
    (project / "package/engine/one.py").write_text(MODULE)
    (project / "test_one.py").write_text(TESTS)
    ours = PYPROJECT["tool"]["pytest"]["ini_options"]
    (project / "pytest.ini").write_text("\n    ".join(["[pytest]\nmarkers =", *ours["markers"]]))
    before = {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}
    # In a process of its own, which has no threads when it forks.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return project, before, *pool.submit(try_all, project, tmp_path_factory.mktemp("copies")).result()


def test_a_change_is_noticed_by_the_test_that_fails_with_it(tried):
    found, lines = tried[2:4]
    assert lines == {"test_one.py::test_larger": [3], "test_one.py::test_forever": [7, 8]}
    for what in ("a > b -> True", "a > b -> (a <= b)", "return a if a > b else b -> return None"):
        assert "test_larger" in found[what]


def test_a_change_that_no_test_sees_is_not_noticed(tried):
    found = tried[2]
    assert found["a > b -> (a >= b)"] == found["a > b -> False"] == found["not ready -> False"] == ""


def test_a_hang_is_noticed(tried):
    found = tried[2]
    assert [found[what] for what in HANGS] == [f"status {HANG}"] * 2


def test_tests_that_fail_as_it_is_notice_nothing(tried):
    assert "expected tests that pass without a change, but pytest said" in tried[4]
    assert "FAILED test_one.py::test_forever" in tried[4]


def test_the_project_itself_is_left_alone(tried):
    project, before = tried[:2]
    assert {file: file.read_bytes() for file in project.rglob("*") if file.is_file()} == before
