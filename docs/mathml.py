"""Formulas of the pages as MathML, which browsers draw themselves: no script, no font and no network."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)


def mathml(formula: str, as_block: bool) -> str:
    r"""The formula as an element `math`. Pages have `\tilde x_t`, which GitHub reads well, docutils `\tilde{x}_t`."""
    text = tex2mathml(re.sub(r"\\tilde (\w)", r"\\tilde{\1}", formula), as_block=as_block)
    root = ElementTree.fromstring(re.sub(r"\s*\n\s*", "", text))
    for element in root.iter(f"{{{NAMESPACE}}}munderover"):
        subscript_beside(element)
    for element in root.iter(f"{{{NAMESPACE}}}mtable") if as_block else ():
        element.set("displaystyle", "true")  # a table sets fractions small
    return ElementTree.tostring(root, encoding="unicode")


def subscript_beside(element: ElementTree.Element) -> None:
    """Put the index of a symbol with a tilde, which docutils puts under it, where other indices are."""
    base, index, tilde = element
    element.tag = f"{{{NAMESPACE}}}msub"
    element[:] = [ElementTree.Element(f"{{{NAMESPACE}}}mover", accent="true"), index]
    element[0].extend([base, tilde])


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True}
