"""The notebooks of the documentation: they run, and what is stored with them is what they put out."""

from __future__ import annotations

import re
import sys

import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

import hf_sampa
from tests.notebooks import METADATA, NOTEBOOKS, code, execute, fingerprint, read


on_every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
# Figures of a training differ in the last places between processors, times between any two runs, and versions as they are installed.
FRACTION = re.compile(r"\d+(\.\d+)+(e[-+]\d+)?")
# Of a home, a temporary folder, an environment, on any system.
MACHINE = re.compile(r"/(home|root|tmp|Users|usr|opt|work|mnt)/|site-packages|[A-Z]:\\\\")


def texts(notebook: NotebookNode) -> list[list[str]]:
    """What each cell puts out: its kind and, of text, the words and whole numbers."""
    return [[shown(output) for output in cell.outputs] for cell in code(notebook)]


def shown(output: NotebookNode) -> str:
    if output.output_type == "stream":
        return f"{output.name}: {FRACTION.sub('#', output.text)}"
    kinds = sorted(output.data)
    return "\n".join([*kinds, *(FRACTION.sub("#", output.data[kind]) for kind in kinds if kind.startswith("text/"))])


# As they are stored


def test_there_are_some():
    assert {path.stem for path in NOTEBOOKS} == {"first_run", "own_trainer", "reading_a_run"}


@on_every_notebook
def test_it_was_run_as_it_is(path):
    notebook = read(path)
    assert notebook.metadata.outputs_of == fingerprint(notebook), f"python -m tests.notebooks {path.stem}"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


@on_every_notebook
def test_it_shows_pictures_and_nothing_that_nobody_needs(path):
    outputs = [output for cell in code(read(path)) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    # Warnings and progress bars.
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@on_every_notebook
def test_it_is_of_no_machine(path):
    notebook = read(path)
    assert notebook.metadata == {**METADATA, "outputs_of": notebook.metadata.outputs_of}
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]
    assert not MACHINE.search(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 300_000


def test_another_cell_has_another_fingerprint():
    cells = [new_code_cell("1 + 1"), new_code_cell("2")]
    assert fingerprint(new_notebook(cells=cells)) != fingerprint(new_notebook(cells=[cells[0], new_code_cell("3")]))
    assert fingerprint(new_notebook(cells=cells)) != fingerprint(new_notebook(cells=cells[::-1]))


def test_words_and_whole_numbers_are_compared_and_what_differs_between_machines_is_not():
    def compared(text):
        return texts(new_notebook(cells=[new_code_cell(outputs=[new_output("stream", text=text)])]))

    assert compared("300 updates, loss 0.0097, torch 2.13.0") == compared("300 updates, loss 1.2e-05, torch 2.9.1")
    for other in ("301 updates, loss 0.0097", "300 steps, loss 0.0097", "300 updates"):
        assert compared("300 updates, loss 0.0097") != compared(other)


# Executed


@pytest.mark.whole
@pytest.mark.timeout(900)
@on_every_notebook
def test_it_puts_out_what_is_stored(path, tmp_path):
    notebook = read(path)
    assert texts(execute(notebook, tmp_path)) == texts(notebook)


@pytest.mark.whole
def test_a_cell_that_raises_is_found_and_the_kernel_is_this_python(tmp_path):
    cells = [
        new_code_cell("import sys, hf_sampa; print(sys.executable, hf_sampa.__file__)"),
        new_code_cell("assert 0"),
    ]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(new_notebook(cells=cells), tmp_path)
    done = execute(new_notebook(cells=cells[:1]), tmp_path)
    assert done.cells[0].outputs[0].text == f"{sys.executable} {hf_sampa.__file__}\n"
