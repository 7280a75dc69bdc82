"""Sphinx directive `{catalogue}`: the variants of hf_sampa, from the catalogue itself, as a `table` or as `entries`."""

from __future__ import annotations

import inspect
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hf_sampa.variants import VARIANTS, Variant
from hf_sampa.variants.__main__ import arguments, parts


IN_ORDER = [VARIANTS[name] for name in sorted(VARIANTS, key=lambda name: (name != "sam", name))]


# As docstrings have them: x_t, g~_t, B_{t+1}.
SYMBOL = re.compile(r"\b(eps|[A-Za-z])(~?)_(t\b|\{t\+1\})")


def plain(text: str) -> str:
    """`text` without meaning to Markdown, but for what is in backticks and for the paper's symbols, which are typeset."""
    pieces = re.split(r"(`[^`]*`|\$[^$]*\$)", SYMBOL.sub(typeset, text))
    pieces[::2] = [re.sub(r"([\\*_~|<>\[\]#])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def typeset(symbol: re.Match[str]) -> str:
    """A symbol as a formula."""
    letter = r"\varepsilon" if symbol[1] == "eps" else symbol[1]
    accent = r"\tilde " if symbol[2] else ""
    return f"${accent}{letter}_{symbol[3]}$"


def cited(source: str) -> str:
    """`source` with links to arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def methods(variant: Variant) -> str:
    """Values of `method` that a variant has."""
    return " and ".join(f"`{method}`" for method in variant.timings)


def overview() -> list[str]:
    """A table with a line per variant."""
    rows = [
        f"| [{plain(variant.name)}](#{variant.name}) | {plain(variant.passes)} | {plain(variant.memory)} | {variant.rho:g} | "
        f"{methods(variant)} |"
        for variant in IN_ORDER
    ]
    return ["| variant | passes | memory | `rho` | `method` |", "|---|---|---|---|---|", *rows]


def entry(variant: Variant) -> list[str]:
    """All that the catalogue knows of a variant."""
    facts = {
        "paper": cited(variant.source),
        "parts": plain(parts(variant)),
        "arguments": plain(arguments(variant)),
        "`method`": methods(variant) + (f" only, because {plain(variant.why)}" if variant.method else ""),
    }
    said = [" ".join(paragraph.split()) for paragraph in inspect.getdoc(variant.make).split("\n\n")]
    return [
        f"({variant.name})=",
        f"### {plain(variant.name)}",
        *(f"{plain(paragraph)}\n" for paragraph in said),
        *(f"- {name}: {fact}" for name, fact in facts.items()),
        "",
    ]


class Catalogue(SphinxDirective):
    """What the argument names: a table with a line for each variant, or a section for each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        if self.arguments[0] == "table":
            return self.parse_text_to_nodes("\n".join(overview()))
        lines = [line for variant in IN_ORDER for line in entry(variant)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("catalogue", Catalogue)
    return {"parallel_read_safe": True}
