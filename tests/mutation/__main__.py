"""Change the package, one place at a time, and see which test notices."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from .changes import Change, changes_of, sample, sources
from .copies import Copy, import_what_is_slow
from .noticing import MEASURED, ROOMS, check_unchanged, measure, notice, quick_and_slow, work
from .reach import Reached, digest, instrumented, reached
from .reasons import REASONS


PROJECT = Path(__file__).parents[2]
PACKAGE = "hf_sampa"
OUT = PROJECT / "out" / "mutation"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    of_modules = {path: changes_of(path, text) for path, text in sources(PROJECT / PACKAGE, ROOMS).items()}
    if args.only:
        of_modules = {path: changes for path, changes in of_modules.items() if path.startswith(tuple(args.only))}
    chosen = sample(of_modules, args.count, args.seed)
    if args.list:
        for change in chosen:
            print(f"{PACKAGE}/{change.path}:{change.lines[0]}: {change.what}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.json")
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        import_what_is_slow()
        copies = [Copy(PROJECT, Path(folder) / str(i)) for i in range(args.jobs)]
        tests = _measure(copies, args.out, args.measure)
        _try(copies, chosen, tests, results, args.retry)
    report(chosen, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=180, help="how many changes to try, at least (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="PATH", help="rooms or modules to change, as engine or data/loaders.py"
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many to try at once (default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="try those again that no test has noticed")
    parser.add_argument("--measure", action="store_true", help="see anew which test runs which line, and for how long")
    parser.add_argument("--list", action="store_true", help="print the changes, and try none")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder of results, by which a run goes on (default: %(default)s)"
    )
    return parser


class Results:
    """What was found of each change, kept in a file from one to the next."""

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}

    def known(self, change: Change, text: str) -> dict:
        """What is known of a change of a module that reads `text`: which test has noticed it, and whether all were tried."""
        found = self.found.get(change.key, {})
        return found if found.get("module") == digest(text) else {"noticed": "", "slow": -1}

    def add(self, change: Change, text: str, slow: bool, noticed: str, seconds: float) -> None:
        """Which test noticed a change, if any, of the quick or the slow ones."""
        line = f"{PACKAGE}/{change.path}:{change.lines[0]}"
        known = {"noticed": noticed, "slow": int(slow), "seconds": round(seconds, 1)}
        self.found[change.key] = {"where": line, "what": change.what, "module": digest(text), **known}
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.file)
        print(f"{line}: {change.what}: {noticed[:150] or 'NOT NOTICED'} ({seconds:.0f} s)", flush=True)


def _measure(copies: list[Copy], out: Path, anew: bool) -> Reached:
    """What the tests reach; measured where that has not been done, or they or the package have changed since."""
    modules = sources(PROJECT / PACKAGE, ROOMS)
    states = {file: digest((PROJECT / file).read_text(), *modules.values()) for file in MEASURED}
    files = [file for file, state in states.items() if anew or reached(file, out, state) is None]
    for instrument in (instrumented, lambda path, text: text):
        for copy, (path, text) in product(copies, modules.items() if files else ()):
            copy.write(f"{PACKAGE}/{path}", instrument(path, text))
        work(copies, [measure(file, out, states[file]) for file in files if instrument is instrumented])
    return {test: of for file, state in states.items() for test, of in (reached(file, out, state) or {}).items()}


def _try(copies: list[Copy], chosen: list[Change], tests: Reached, results: Results, retry: bool) -> None:
    """Quick tests on all changes that have not been tried, then all tests on those that are left, but for what has a reason."""
    texts = sources(PROJECT / PACKAGE, ROOMS)
    for slow in (False, True):
        jobs = []
        for change in chosen:
            known = results.known(change, texts[change.path])
            if known["noticed"] or (known["slow"] >= slow and not retry) or (slow and change.key in REASONS):
                continue
            stages = quick_and_slow(change, tests)[slow]
            if not jobs and stages:
                jobs.append(check_unchanged(stages[0]))
            add = partial(results.add, change, texts[change.path], slow)
            jobs.append(notice(change, texts[change.path], stages, PACKAGE, add))
        work(copies, jobs)


def report(chosen: list[Change], results: Results) -> None:
    """Print, per module and in all, how many were tried and noticed, and those that were not, with the reason if it is known."""
    print(f"\n{'module':<32}{'tried':>6}{'noticed':>9}{'with a reason':>15}")
    rows = {"in all": [0, 0, 0]}
    for change in chosen:
        noticed = bool(results.found[change.key]["noticed"])
        for row in (rows.setdefault(change.path, [0, 0, 0]), rows["in all"]):
            row[0] += 1
            row[1] += noticed
            row[2] += not noticed and change.key in REASONS
    for name, row in sorted(rows.items(), key=lambda row: (row[0] == "in all", row[0])):
        print(f"{name:<32}{row[0]:>6}{row[1]:>9}{row[2]:>15}")
    tried, noticed, explained = rows["in all"]
    print(
        f"{noticed / max(tried, 1):.1%} noticed, {noticed / max(tried - explained, 1):.1%} of those without a reason\n"
    )
    for change in chosen:
        if not results.found[change.key]["noticed"]:
            why = REASONS.get(change.key, "NO TEST AND NO REASON")
            print(f"{PACKAGE}/{change.path}:{change.lines[0]}: {change.what}\n    {why}")


if __name__ == "__main__":
    main()
