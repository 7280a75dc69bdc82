"""Sphinx settings: Markdown pages, the reference from docstrings, the catalogue of variants from the package itself."""

import re
import sys
from pathlib import Path


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from hf_sampa import __version__  # noqa: E402


project = "hf_sampa"
author = "the authors of hf_sampa"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "catalogue", "mathml"]
exclude_patterns = ["_build"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_theme = "furo"
# In which what a diff takes away is red, and what it adds green.
pygments_style = "default"
html_title = "hf_sampa"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 3
# Formulas are written as GitHub reads them: between dollars, and in blocks of ```math.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = {"math"}
myst_dmath_allow_space = False
myst_dmath_allow_digits = False

nitpicky = True
# torch, transformers and Python have documentation of their own, which nothing is fetched from.
nitpick_ignore_regex = [(r"py:.*", r"(torch|transformers|collections)(\..*)?")]
# A single pair of backticks is code, as in Markdown.
default_role = "literal"
# Notebooks are shown as they are stored, with what they put out; `python -m tests.notebooks` runs them.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
# Quotation marks and dashes stay what one can type.
smartquotes = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False


def show_contributing() -> str:
    """CONTRIBUTING.md as a page of docs/, its drawing of the rooms as a table."""
    text = (HERE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#)", "](../", text).replace("](../docs/", "](")
    return re.sub(r"```mermaid\n(.*?)```\n", lambda drawing: rooms(drawing[1]), text, flags=re.DOTALL)


def rooms(arrows: str) -> str:
    """A table with a line for each room that imports from others."""
    below: dict[str, list[str]] = {}
    for room, other in re.findall(r"(\w+) --> (\w+)", arrows):
        below.setdefault(room, []).append(f"`{other}`")
    lines = [f"| `{room}` | {', '.join(others)} |" for room, others in below.items()]
    return "\n".join(["| room | imports from |", "|---|---|", *lines, ""])


def link_repository_files(app, docname: str, source: list[str]) -> None:
    """Let links out of docs/, which a reader of the repository can follow, open files."""
    text = show_contributing() if docname == "contributing" else source[0]
    text = re.sub(r"(?<!!)(\[[^\]]*\])\(\.\./CONTRIBUTING\.md(#[^)]*)?\)", r"\1(contributing.md\2)", text)
    out = re.escape("../" * (docname.count("/") + 1))
    source[0] = re.sub(rf"(?<!!)(\[[^\]]*\])\(({out}[^)#]+)(#[^)]*)?\)", r"\1(path:\2)", text)


def setup(app) -> None:
    app.connect("source-read", link_repository_files)
