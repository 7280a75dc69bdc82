"""The house: its floors, what is private to a room, and names that modules had before."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

from tests.house import PACKAGE, drawn, imports_from_elsewhere, parts_of_page


ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_rooms_import_from_rooms_below_them():
    """The contracts in pyproject.toml."""
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    found = subprocess.run([sys.executable, "-c", lint], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_what_a_room_does_not_export_is_private_to_it():
    for path in PACKAGE.rglob("*.py"):
        for node in imports_from_elsewhere(path):
            room, *inside = (node.module or "").split(".")
            if room in ROOMS:
                exported = importlib.import_module(f"hf_sampa.{room}").__all__
                names = {alias.name for alias in node.names}
                assert not inside and names <= set(exported), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_exports_what_others_use(room):
    module = importlib.import_module(f"hf_sampa.{room}")
    assert 2 <= module.__doc__.count(".") and len(module.__doc__) < 400
    used = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == room and node.level
        for alias in node.names
    }
    scripts = "".join(
        path.read_text()
        for folder in ("benchmarks", "docs", "glue", "vit_finetune", "tests", ".")
        for path in (PACKAGE.parent / folder).glob("*.*")
        if path.suffix in (".py", ".md")
    )
    assert [name for name in module.__all__ if name not in used and name not in scripts] == []


def test_the_picture_is_up_to_date():
    """Draw it anew: python -m tests.house."""
    assert parts_of_page()[1] == drawn()


def test_former_names():
    """As README and the documentation had them."""
    from hf_sampa import distributed, variants
    from hf_sampa.exchange import close_groups
    from hf_sampa.parts import Direction, Mask, When
    from hf_sampa.recipe import Recipe

    assert close_groups is distributed.close_groups and Recipe is variants.Recipe
    assert (Direction, Mask, When) == (variants.Direction, variants.Mask, variants.When)
