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

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "catalogue"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hf_sampa"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 3

nitpicky = True
# torch, transformers and Python have documentation of their own, which nothing is fetched from.
nitpick_ignore_regex = [(r"py:.*", r"(torch|transformers|collections)(\..*)?")]
# A single pair of backticks is code, as in Markdown.
default_role = "literal"
# Quotation marks and dashes stay what one can type.
smartquotes = False
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False


def link_repository_files(app, docname: str, source: list[str]) -> None:
    """Show the README as a page, and let links out of docs/, which a reader of the repository can follow, open files."""
    text = source[0]
    if docname == "readme":
        text = (HERE.parent / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:|#)", "](../", text).replace("](../docs/", "](")
    text = re.sub(r"(?<!!)(\[[^\]]*\])\(\.\./README\.md(#[^)]*)?\)", r"\1(readme.md\2)", text)
    source[0] = re.sub(r"(?<!!)(\[[^\]]*\])\((\.\./[^)#]+)(#[^)]*)?\)", r"\1(path:\2)", text)


def setup(app) -> None:
    app.connect("source-read", link_repository_files)
