"""Which lines of the package each test runs in its own process, and how long it takes: who is to notice a change."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


SEEN = "__lines_seen__"  # a set that all instrumented modules share
Reached = dict[str, dict]  # test: {"seconds": s, "lines": {module: [line, ...]}}


class Reach:
    """A plugin of pytest that writes down, for every test that passes, its seconds and the lines that it runs.

    The copy that the tests run in is to be `instrumented`.

    Args:
        file: of the tests.
        folder: where it writes.
        state: digest of what the lines depend on, tests and package.
    """

    def __init__(self, file: str, folder: Path, state: str):
        self.file, self.folder, self.state, self.tests = file, folder, state, {}
        self._passed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        seen, began = vars(builtins).setdefault(SEEN, set()), time.monotonic()
        seen.clear()
        try:
            return (yield)
        finally:
            if item.nodeid in self._passed:
                lines: dict[str, list[int]] = {}
                for path, line in sorted(seen):
                    lines.setdefault(path, []).append(line)
                self.tests[item.nodeid] = {"seconds": round(time.monotonic() - began, 2), "lines": lines}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._passed.add(report.nodeid)
        elif report.failed:
            self._passed.discard(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        found = {"digest": self.state, "tests": self.tests}
        _measured(self.file, self.folder).write_text(json.dumps(found))


def instrumented(path: str, source: str) -> str:
    """The module at `path`, writing down every statement of its functions before it runs; a tracer would slow down all else."""
    tree = _Instrument(path).visit(ast.parse(source))
    begin = f"import builtins\n{SEEN} = vars(builtins).setdefault({SEEN!r}, set())"
    future = [
        i for i, each in enumerate(tree.body) if isinstance(each, ast.ImportFrom) and each.module == "__future__"
    ]
    at = future[-1] + 1 if future else 0
    tree.body[at:at] = ast.parse(begin).body
    return ast.unparse(ast.fix_missing_locations(tree))


class _Instrument(ast.NodeTransformer):
    def __init__(self, path: str):
        self.path, self._depth = path, 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody") if self._depth else ():
            statements = getattr(node, name, None)
            if isinstance(statements, list) and not isinstance(node, ast.ClassDef):
                setattr(node, name, [new for each in statements for new in (*self._noted(each), each)])
        return node

    def _noted(self, statement: ast.stmt) -> list[ast.stmt]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):  # a docstring is to stay one
            return []
        return ast.parse(f"{SEEN}.add(({self.path!r}, {statement.lineno}))").body


def reached(file: str, folder: Path, state: str) -> Reached | None:
    """What was written of the tests of `file`; None where tests and package were in another state than `state`."""
    measured = _measured(file, folder)
    found = json.loads(measured.read_text()) if measured.exists() else {}
    return found["tests"] if found.get("digest") == state else None


def _measured(file: str, folder: Path) -> Path:
    return folder / f"{Path(file).stem}.json"


def digest(*texts: str) -> str:
    """Stands for `texts`."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
