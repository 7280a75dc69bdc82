"""The house as CONTRIBUTING.md draws it: which room imports from which.

python -m tests.house      # draws it anew
"""

from __future__ import annotations

import ast
from pathlib import Path

import networkx

import hf_sampa


PACKAGE = Path(hf_sampa.__file__).parent
PAGE = PACKAGE.parent / "CONTRIBUTING.md"
BEGIN, END = "<!-- house -->\n", "<!-- /house -->"


def arrows() -> set[tuple[str, str]]:
    """Rooms, and modules that are in none, with what each of them imports from."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in imports_from_elsewhere(path):
            found |= {
                (parts[0], name)
                for name in [node.module or "", *(alias.name for alias in node.names)]
                if is_room(name)
            }
    return {(one, other) for one, other in found if one not in (other, "__init__")}


def imports_from_elsewhere(path: Path) -> list[ast.ImportFrom]:
    """Imports from other rooms, or from modules that are in none."""
    depth = len(path.relative_to(PACKAGE).parts)
    tree = ast.parse(path.read_text())
    for_types = {id(node) for each in ast.walk(tree) if isinstance(each, ast.If) for node in ast.walk(each)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in for_types]
    return [node for node in nodes if node.level == depth]


def is_room(name: str) -> bool:
    """Whether `name` is that of a room, or of a module that is in none."""
    return (
        (PACKAGE / name / "__init__.py").exists()
        if (PACKAGE / name).is_dir() and name
        else (PACKAGE / f"{name}.py").exists()
    )


def drawn() -> str:
    """The block of CONTRIBUTING.md."""
    graph = networkx.transitive_reduction(networkx.DiGraph(sorted(arrows())))
    lines = [f"    {one} --> {other}" for one, other in sorted(graph.edges)]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def parts_of_page() -> tuple[str, str, str]:
    """What comes before the picture, the picture, and what comes after it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    picture, _, after = rest.partition(END)
    return before, picture, after


if __name__ == "__main__":
    before, _, after = parts_of_page()
    PAGE.write_text(before + BEGIN + drawn() + END + after)
    print(f"{len(arrows())} arrows between rooms, and modules in none")
