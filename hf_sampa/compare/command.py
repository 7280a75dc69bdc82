"""``python -m hf_sampa.compare CONFIG.yaml``: from the file to the report."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import yaml

from ..files import in_place_of, read_json
from ..launch import configurations
from . import choosing, config, landscape, report
from .carry_out import Executor, alone, slots, told
from .config import Comparison
from .findings import Findings
from .holding import HELD, held
from .rows import rows, write_csv, write_dataset
from .runs import CHOOSE, SCORE, TIME, Run, scored, timed
from .runs import choosing as choosing_runs
from .search import search


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m hf_sampa.compare",
        description="Run a script with several methods, tasks and seeds, and report what can be said of them: means, intervals, "
        "differences on equal seeds, time, sharpness. Interrupted, it continues where it was when it is called again.",
        epilog=f"CONFIG.yaml:\n\n{config.__doc__.split('code-block:: yaml')[1].rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what is compared; see below")
    made.add_argument(
        "--output_dir",
        type=Path,
        help="folder of the runs and the report (default: out/compare/FOLDER/CONFIG, by the names of the file and its folder)",
    )
    made.add_argument(
        "--jobs", type=_positive, help="runs at a time (default: one for each GPU, or each core of the CPU)"
    )
    made.add_argument(
        "--search", type=_positive, metavar="TRIALS", help="choose settings by so many trials within ranges"
    )
    made.add_argument("--report", action="store_true", help="write the report of what is done, and run nothing")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Carry out the comparison of the command line `argv`, and write its report.

    Raises:
        SystemExit: the file says something that cannot be run (2); a run failed (1), the others are in the report; or a signal
            asked for the end.
    """
    options = parser().parse_args(argv)
    try:
        comparison = config.read(options.config, options.search)
        root = (options.output_dir or Path("out/compare") / comparison.name).resolve()
        _open(root, options.config.resolve(), run=not options.report)
        with _ended_by_signals():
            failed = compare(comparison, root, options.jobs, run=not options.report)
    except (OSError, RuntimeError, ValueError) as error:
        parser().error(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if failed:
        sys.exit(
            f"{failed} run{'s' * (failed > 1)} failed; the report names them. Called again, this command tries them once more."
        )


def compare(comparison: Comparison, root: Path, jobs: int | None = None, run: bool = True) -> int:
    """Carry out what is not done yet, and write the report into `root`; how many runs failed."""
    executor, shared = Executor(comparison.script, root), slots(jobs, _processes(comparison.launch))
    if run:
        with held(root / ".prepare.held"):
            _prepare(comparison, root)

    def try_out(runs: Sequence[Run]) -> None:
        if run:
            executor.carry_out(runs, shared, CHOOSE)

    if comparison.choose and comparison.choose.trials:
        tried = [each for _, runs in search(comparison, try_out, root) for each in runs]
    else:
        try_out(tried := list(choosing_runs(comparison)))
    chosen = choosing.settings(comparison, tried, root)

    rounds = list(timed(comparison, chosen))
    if run:
        executor.carry_out([each for runs in rounds for each in runs], alone(), TIME)
    seconds = choosing.seconds_per_step(rounds, root)
    with held(root / HELD):
        longer = choosing.longer(comparison, rounds, seconds, root)

    compared = list(scored(comparison, chosen, longer))
    if run:
        executor.carry_out(compared, shared, SCORE)

    problems = []
    try:
        around = landscape.measure(comparison, compared, root, run)
    except RuntimeError as error:
        around = None
        problems.append(str(error))

    runs = [*tried, *(each for runs in rounds for each in runs), *compared]
    failed = [failure for each in runs if (failure := each.failure(root))]
    problems = [*(told(each, root) for each in failed), *problems]
    with held(root / HELD):
        found = rows(runs, comparison.script, root)
        write_csv(found, root / "results.csv")
        if found:
            write_dataset(found, root / "results.parquet")
        sections = Findings(comparison, found, chosen, longer, seconds, problems, root, around).sections()
        files = report.write(comparison.name, sections, root)
    print(report.as_markdown(comparison.name, sections))
    print("\n".join(f"{form}: {file}" for form, file in {**files, "csv": root / "results.csv"}.items()))
    return len(problems)


def _open(root: Path, file: Path, run: bool) -> None:
    """See that the folder is one for the comparison of this `file`. Raises ValueError."""
    note = root / "comparison.json"
    if not run and not note.exists() and not (root / "runs").is_dir():
        raise ValueError(
            f"--report: expected the folder of a comparison, got {root}, which is none. Check --output_dir."
        )
    root.mkdir(parents=True, exist_ok=True)
    with held(root / HELD):
        before = Path(read_json(note)["config"]) if note.exists() else file
        if before != file and before.exists():
            raise ValueError(
                f"--output_dir: expected a folder for {file}, but {root} has the runs of {before}. Name another one."
            )
        with in_place_of(note) as partial:
            partial.write_text(json.dumps({"config": str(file)}) + "\n", encoding="utf-8")


def _processes(launch: str) -> int:
    """That a launch configuration starts."""
    return int(yaml.safe_load(configurations()[launch].read_text(encoding="utf-8"))["num_processes"])


def _prepare(comparison: Comparison, root: Path) -> None:
    """Commands that make what the runs need; each once. Raises ValueError for one that fails."""
    done_file, here = root / "prepared.json", str(Path.cwd())
    done = read_json(done_file) if done_file.exists() else []
    for line in comparison.prepare:
        if [line, here] in done:
            continue
        words = shlex.split(line)
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        try:
            code = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise ValueError(f"prepare: expected a command that can be started, got: {line}: {error}") from error
        if code:
            raise ValueError(
                f"prepare: expected a command that succeeds, got exit code {code} of: {line}. It was called in {here}; paths in a comparison "
                "are from the folder that compare is called in."
            )
        done.append([line, here])
        with in_place_of(done_file) as file:
            file.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the block a signal to end is an exception, after which all runs are ended, too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
