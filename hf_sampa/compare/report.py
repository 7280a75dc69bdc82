"""What a comparison found, as sections of text, tables and pictures; and these as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader

from ..files import in_place_of


@dataclass(frozen=True)
class Table:
    """Cells are texts; the first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether its cells are numbers, or begin with one, or are empty."""
        return [all(re.match(r"[-+]?\d|-?$", cell) for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Picture:
    """A file beside the report, and what it shows, also for whoever does not see it."""

    file: Path
    shows: str


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    text: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)
    pictures: Sequence[Picture] = field(default_factory=tuple)


def write(title: str, sections: Sequence[Section], folder: Path) -> dict[str, Path]:
    """``report.md``, and ``report.html`` with its pictures in it, into `folder`; gives their paths by form."""
    forms = {"md": as_markdown(title, sections), "html": as_html(title, sections)}
    files = {form: folder / f"report.{form}" for form in forms}
    for form, file in files.items():
        with in_place_of(file) as partial:
            partial.write_text(forms[form], encoding="utf-8")
    return files


def as_markdown(title: str, sections: Iterable[Section]) -> str:
    """With pictures by their names, for the folder that they are in."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *([section.text] if section.text else [])]
        for table in section.tables:
            parts += [_markdown_table(table), *([table.note] if table.note else [])]
        parts += [f"![{picture.shows}]({picture.file.name})" for picture in section.pictures]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---:" if numeric else "---" for numeric in table.numeric], *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_html(title: str, sections: Iterable[Section]) -> str:
    """One page that needs no other file and no network."""
    pages = Environment(
        loader=PackageLoader("hf_sampa.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template("report.html.jinja").render(title=title, sections=list(sections), encoded=_encoded)


def _encoded(picture: Picture) -> str:
    return base64.b64encode(picture.file.read_bytes()).decode()
