"""What can be changed in a module, one place at a time.

Left out is what cannot change behaviour, or is for people: messages, log lines, docstrings, annotations, exports, asserts
and `strict=` of zip, which is one.
"""

from __future__ import annotations

import ast
import copy
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path


COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
FOLDERS = ("folder", "output_dir", "Path")  # what is divided by a name is a path
TEXT = (ast.JoinedStr, ast.Constant)


@dataclass(frozen=True)
class Change:
    """One change of one module.

    Attributes:
        path: of the module, in the package.
        lines: first and last line of what is executed with it.
        function: first and last line of the function that it is in; None outside of functions.
        start, end: where the text to be replaced is, in bytes.
        text: of the line where it begins, without a comment.
        before: the statement or expression that is replaced, without its layout, and
        after: what takes its place.
        again: how many changes before it in the module read the same.
    """

    path: str
    lines: tuple[int, int]
    function: tuple[int, int] | None
    start: int
    end: int
    text: str
    before: str
    after: str
    again: int = 0

    @property
    def what(self) -> str:
        """What takes the place of what."""
        return f"{self.before} -> {self.after}"

    @property
    def key(self) -> str:
        """The same in every run, and after changes elsewhere in the module."""
        where = self.path if self.text == self.before else f"{self.path}: {self.text}"
        return f"{where}: {self.what}" + (f" ({self.again + 1})" if self.again else "")

    def applied(self, source: str) -> str:
        """`source`, of the module, with the change."""
        text = source.encode()
        return (text[: self.start] + self.after.encode() + text[self.end :]).decode()


def changes_of(path: str, source: str) -> list[Change]:
    """All changes of a module, in the order of its lines."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    changes, seen = [], Counter()
    for change in sorted(finder.found, key=lambda change: (change.start, change.end, change.after)):
        changes.append(replace(change, again=seen[change.key]))
        seen[change.key] += 1
    return changes


def sample(of_modules: dict[str, list[Change]], count: int, seed: int) -> list[Change]:
    """At least `count` changes, from each module in proportion to what it has; a larger count adds to a smaller one."""
    total = sum(map(len, of_modules.values()))
    chosen = []
    for path, changes in of_modules.items():
        share = -(-count * len(changes) // max(total, 1))
        chosen += random.Random(f"{seed} {path}").sample(changes, len(changes))[:share]
    return chosen


def sources(package: Path, rooms: tuple[str, ...]) -> dict[str, str]:
    """The modules of some rooms of a package, by their paths in it."""
    files = sorted(file for room in rooms for file in (package / room).rglob("*.py"))
    return {file.relative_to(package).as_posix(): file.read_text() for file in files}


class _Finder(ast.NodeVisitor):
    """Collects changes."""

    def __init__(self, path: str, source: str):
        self.path, self.found, self._functions, self._lines = path, [], [], (0, 0)
        self._starts, self._texts = [0], source.splitlines()
        for line in source.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            header = getattr(node, "test", getattr(node, "iter", node))
            self._lines = (node.lineno, node.end_lineno if header is node else header.end_lineno)
            if hasattr(node, "body") and header is node:
                self._lines = (node.lineno, node.lineno)
            self._drop(node)
        if not _is_for_people(node):
            super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        lines = self._lines
        for name, value in ast.iter_fields(node):
            # Annotations change nothing, and what decorates is seldom a matter of a number.
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)
                    self._lines = lines

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions.append((node.lineno, node.end_lineno))
        self.generic_visit(node)
        self._functions.pop()

    # ---- Expressions ----

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, op in enumerate(node.ops):
            for other in COMPARED[type(op)]:
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                self._replace(node, ast.Compare(node.left, ops, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._replace(node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not) or not isinstance(node.operand, ast.Constant):
            self._replace(node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # An alias of types, or a text.
        is_type = isinstance(node.op, ast.BitOr) and (not self._functions or not _may_be_sets(node))
        is_text = any(isinstance(side, TEXT) and not _is_number(side) for side in (node.left, node.right))
        is_path = isinstance(node.op, ast.Div) and _begins_with(node.left, *FOLDERS)
        if type(node.op) in COMPUTED and not (is_type or is_text or is_path):
            self._replace(node, ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, ast.Constant(not node.value))
        elif isinstance(node.value, int):
            self._replace(node, ast.Constant(node.value + 1))
        elif isinstance(node.value, float):
            self._replace(node, ast.Constant(2 * node.value or 1.0))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._decide(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._decide(test, (True,))
        self.generic_visit(node)

    # ---- Statements ----

    def visit_If(self, node: ast.If) -> None:
        self._decide(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._decide(node.test, (False,))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        other = copy.copy(node)
        other.op = COMPUTED[type(node.op)]()
        self._replace(node, other)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace(node, ast.Return(ast.Constant(None)))
        self.generic_visit(node)

    def _drop(self, node: ast.stmt) -> None:
        """Leave out a statement with an effect."""
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = [each for target in targets for each in getattr(target, "elts", [target])]
            kept = isinstance(node, ast.AugAssign) or any(isinstance(x, ast.Attribute | ast.Subscript) for x in inner)
            effect = kept and node.value is not None
        else:
            effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_for_people(node)
            effect = effect or isinstance(node, ast.Delete | ast.Raise | ast.Break | ast.Continue)
            effect = effect or (isinstance(node, ast.Return) and node.value is None)
        if effect:
            self._replace(node, ast.Pass())

    def _decide(self, test: ast.expr, values: tuple[bool, ...] = (True, False)) -> None:
        """Make a condition true, or false; of one that names what it finds only what does not need the name."""
        names = any(isinstance(node, ast.NamedExpr) for node in ast.walk(test))
        for value in values:
            if not (value and names) and not (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"):
                self._replace(test, ast.Constant(value))

    def _replace(self, node: ast.expr | ast.stmt, other: ast.AST) -> None:
        after = ast.unparse(other)
        if isinstance(other, ast.expr) and not isinstance(other, ast.Constant | ast.Name):
            after = f"({after})"
        self.found.append(
            Change(
                self.path,
                self._lines,
                self._functions[-1] if self._functions else None,
                self._starts[node.lineno - 1] + node.col_offset,
                self._starts[node.end_lineno - 1] + node.end_col_offset,
                self._texts[node.lineno - 1].partition("  # ")[0].strip(),
                _shown(node),
                after,
            )
        )


def _is_for_people(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return _begins_with(node.value.func, "logger")
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _begins_with(node: ast.expr, *names: str) -> bool:
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return isinstance(node, ast.Name) and node.id in names


def _shown(node: ast.expr | ast.stmt) -> str:
    """Without layout and messages."""
    text = " ".join(ast.unparse(node).split())
    return f"{text.partition('(')[0]}(...)" if isinstance(node, ast.Raise) and "(" in text else text


def _may_be_sets(node: ast.BinOp) -> bool:
    """Not of types only, as the second argument of isinstance is."""
    return not all(_names_a_type(side) for side in (node.left, node.right))


def _names_a_type(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _names_a_type(node.left) and _names_a_type(node.right)
    last = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "None")
    builtin = last in ("str", "bytes", "int", "float", "bool", "list", "tuple", "dict", "ndarray")
    return isinstance(node, ast.Name | ast.Attribute | ast.Constant) and (builtin or last[:1].isupper())


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)
