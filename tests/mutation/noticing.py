"""Which tests are to notice a change, in which order, and whether one does."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from .changes import Change
from .copies import Copy, Run, start
from .reach import Reach, Reached


ROOMS = ("engine", "data", "checkpoints")
# Whose tests run a room's lines in the process of the test: these are measured, one by one.
MEASURED = """
    reference engine batches variants own_loaders saving lookahead optimizers variant_parts undo bad_input
    variant_input trained own_steps forward_state safety rehearsal trainers collected around_models curvature sharpness
    memory shared_gradient_memory model_card logs
"""
MEASURED = tuple(f"tests/test_{name}.py" for name in MEASURED.split())
# Whose tests start processes, which run the lines of a module or room: as files, the sharpest first.
WITH_PROCESSES = {
    "engine/placement": """
        distributed/sharding distributed/three_axes distributed/diagnostics distributed/variants distributed/precision
    """,
    "engine/precision": "distributed/precision",
    "engine/trained": "trained distributed/two_processes",
    "engine/undone_step": "optimizers distributed/two_processes",
    "engine": """
        distributed/two_processes distributed/failures distributed/agreement distributed/variants engine distributed/sharding
        distributed/diagnostics optimizers distributed/precision own_steps rehearsal distributed/batch_shapes
        distributed/three_axes
    """,
    "data": "distributed/two_processes own_loaders distributed/batch_shapes distributed/around_models distributed/role_world",
    "checkpoints": "distributed/resume distributed/saving distributed/failures distributed/sharding distributed/publish",
}
ASKED_FOR = "not whole and not gpu"
FIRST_SECONDS = 25  # of tests that are tried before all others
SLOWER = 6  # how much longer than measured a run may take, on a machine that does other work, too
TO_BEGIN = 120  # seconds that a run may take besides its tests
OF_A_FILE = 150  # seconds that are expected of a file whose tests start processes

Stage = tuple[list[str], float, str]  # tests, their seconds, and which of them are meant, by their marks
Job = Callable[[Copy], Generator[Run, int, None]]


def measure(file: str, folder: Path, state: str) -> Job:
    """A job that writes down, in `folder`, what the tests of `file` reach in this `state`; in a copy that is `instrumented`."""

    def job(copy: Copy) -> Generator[Run, int, None]:
        began = time.monotonic()
        run = start(copy, [file], 3600, [Reach(file, folder, state)], "-m", f"not distributed and {ASKED_FOR}")
        status = yield run
        if status not in (0, 1, 5):  # 1: of what fails as it is, nothing is expected; 5: nothing was asked for
            raise RuntimeError(f"expected tests that can be run in {file}, but pytest said:\n{run.log.read_text()}")
        print(
            f"measured {file} in {time.monotonic() - began:.0f} s" + (f": {run.failed()}" if status == 1 else ""),
            flush=True,
        )

    return job


def check_unchanged(stage: Stage) -> Job:
    """A job that raises where a stage does not pass as the package is: it would then seem to notice every change."""

    def job(copy: Copy) -> Generator[Run, int, None]:
        tests, seconds, marks = stage
        run = start(copy, tests, SLOWER * seconds + TO_BEGIN, (), "-x", "-m", f"{marks} and {ASKED_FOR}")
        status = yield run
        if status not in (0, 5):
            raise RuntimeError(f"expected tests that pass without a change, but pytest said:\n{run.log.read_text()}")

    return job


def split(change: Change, tests: Reached) -> tuple[list[str], list[str]]:
    """Those of `tests` that run the lines of a change: a few of which most is to be expected, and the others.

    Much is to be expected of a test that runs many lines of the module, and is quick; less of one like another before it,
    unless it costs nothing.
    """
    found = _reaching(change, tests)
    found.sort(key=lambda test: -len(tests[test]["lines"].get(change.path, ())) / (0.2 + tests[test]["seconds"]))
    functions, again = set(), {}
    for test in found:
        again[test] = test.partition("[")[0] in functions and tests[test]["seconds"] > 0.2
        functions.add(test.partition("[")[0])
    found.sort(key=again.__getitem__)
    total, first = 0.0, []
    for test in found:
        total += tests[test]["seconds"]
        if total < FIRST_SECONDS or not first:
            first.append(test)
    chosen = set(first)
    return first, [test for test in found if test not in chosen]


def _reaching(change: Change, tests: Reached) -> list[str]:
    """By the lines of the change or, where they run when the module is imported, by the whole function or module."""
    for lines in (change.lines, change.function, (1, 10**9)):
        found = [
            test
            for test, of in tests.items()
            if lines and any(lines[0] <= line <= lines[1] for line in of["lines"].get(change.path, ()))
        ]
        if found or lines == change.function:
            break
    return found


def notice(
    change: Change, source: str, stages: Sequence[Stage], package: str, report: Callable[[str, float], None]
) -> Job:
    """A job that tries a change, and reports which test noticed it, "" for none, and after how many seconds.

    A hang is noticed, as is a module that cannot be imported.
    """

    def job(copy: Copy) -> Generator[Run, int, None]:
        began, path = time.monotonic(), f"{package}/{change.path}"
        copy.write(path, change.applied(source))
        noticed = ""
        try:
            for tests, seconds, marks in stages:
                options = ("-x", "-o", "timeout=200", "-m", f"{marks} and {ASKED_FOR}")
                run = start(copy, tests, SLOWER * seconds + TO_BEGIN, (), *options)
                status = yield run
                if status not in (0, 5):
                    noticed = run.failed() or f"status {status}"
                    break
        finally:
            copy.write(path, source)
        report(noticed, time.monotonic() - began)

    return job


def quick_and_slow(change: Change, tests: Reached) -> tuple[list[Stage], list[Stage]]:
    """What is tried at once, and what is tried on a change that this does not notice."""
    first, others = split(change, tests)
    names = next((names for path, names in WITH_PROCESSES.items() if change.path.startswith(path)), "").split()
    files = [Path("tests", name).with_name(f"test_{Path(name).name}.py").as_posix() for name in names]
    of_one = [
        (each, sum(tests[test]["seconds"] for test in each), "not distributed") for each in (first, others) if each
    ]
    of_several = [(each, OF_A_FILE * len(each), "distributed") for each in (files[:1], files[1:]) if each]
    # What no process runs alone is noticed by several, if at all.
    at_once = of_one[:1] or of_several[:1]
    return at_once, [stage for stage in (*of_several[:1], *of_one, *of_several[1:]) if stage not in at_once]


def work(copies: Sequence[Copy], jobs: Iterable[Job]) -> None:
    """Do `jobs`, as many at once as there are copies; however it ends, no process is left."""
    waiting, active = iter(jobs), {}
    idle = list(copies)
    try:
        while True:
            while idle and (job := next(waiting, None)):
                doing = job(idle[-1])
                active[idle.pop()] = doing, next(doing)
            if not active:
                return
            for copy, (doing, run) in list(active.items()):
                if run.poll() is None:
                    continue
                try:
                    active[copy] = doing, doing.send(run.status)
                except StopIteration:
                    del active[copy]
                    idle.append(copy)
            time.sleep(0.05)
    finally:
        for doing, run in active.values():
            run.end()
            doing.close()
