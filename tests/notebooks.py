"""The notebooks of the documentation, executed. They are stored with what they put out, for readers who do not run them:

python -m tests.notebooks            # all of them anew, each in an empty folder
python -m tests.notebooks first_run  # this one
"""

from __future__ import annotations

import os
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.project import ROOT


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# What a reader's program needs to know: which language it is, and which kernel of its own to start.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fingerprint(notebook: NotebookNode) -> str:
    """Of what is run: the stored outputs are of these cells if it is the one that was stored with them."""
    return sha256("\0".join(cell.source for cell in code(notebook)).encode()).hexdigest()[:16]


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells in `folder`, with this Python and this package, one thread, and no network; gives the notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.from_dict({**notebook, "metadata": METADATA})
    # Without the kernels that are installed on the machine, python3 is the Python that runs this.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    settings = {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / ".ipython"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # tqdm's, where a notebook's kernel has no ipywidgets.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    client = NotebookClient(
        notebook,
        km=kernel,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with patch.dict(os.environ, settings):
        # Which ends the kernel, too: one that was given is left running.
        client.execute(cleanup_kc=True)
    notebook.metadata = nbformat.from_dict({**METADATA, "outputs_of": fingerprint(notebook)})
    return notebook


def main(names: list[str]) -> None:
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(execute(read(path), Path(folder)), path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
