"""The documentation: its code runs, its commands are taken, its links lead somewhere, and it builds without a warning."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from unittest import SkipTest
from unittest.mock import patch

import classification_arguments
import datasets
import glue_arguments
import make_sample
import pytest
import vit_arguments
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from matplotlib.text import Text
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import BertConfig, BertModel

import hf_sampa.__main__ as command_line
import hf_sampa.variants.__main__ as catalogue
from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments, launch
from hf_sampa.compare import command as comparison
from hf_sampa.compare import config
from hf_sampa.compare.runs import scored
from hf_sampa.plan import command as plan
from hf_sampa.variants import VARIANTS
from tests import notebooks, tiny
from tests.pictures import make_pictures


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))]
# Of a line of code: what fits a page of the built documentation in a window of 1280 pixels.
WIDTH = 88
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
on_every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)
# Notebooks are run by `tests/test_notebooks.py`; what else holds for a page holds for them.
on_all_that_is_read = pytest.mark.parametrize(
    "page", [*PAGES, *notebooks.NOTEBOOKS], ids=[*IDS, *(path.name for path in notebooks.NOTEBOOKS)]
)


def markdown(page: Path) -> str:
    """The text of a page; a notebook's as if it were one, with its code in blocks."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = notebooks.read(page).cells
    return "\n\n".join(f"````\n{cell.source}\n````" if cell.cell_type == "code" else cell.source for cell in cells)


# Python blocks


def after_the_change(example: Example) -> None:
    """Run what a diff leaves."""
    lines = [line[2:] for line in example.parsed.splitlines() if not line.startswith("-")]
    exec("\n".join(lines), example.namespace)


@pytest.fixture(scope="module")
def files_of_a_reader(tmp_path_factory) -> Path:
    """``reviews.csv``, ``pictures/``, and the models trained on them, small and where their names on the Hub lead offline."""
    folder = tmp_path_factory.mktemp("reader")
    make_pictures(folder)
    rows = [
        f"the plot is {word},{label}" for word, label in [("vivid", "good"), ("dull", "bad"), ("long", "neither")] * 5
    ]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows, ""]))
    model = folder / "distilbert" / "distilbert-base-uncased"
    make_sample.make_tiny_bert(model, hidden_size=16, num_layers=1, dropout=0.0)
    BertModel(BertConfig.from_pretrained(model)).save_pretrained(model)
    return folder


@on_every_page
def test_the_code_runs(page, files_of_a_reader, tmp_path, monkeypatch):
    """All blocks of a page in order, in a folder with a reader's files, with what a reader brings: a model, arguments and data.

    A block after a line ``<!-- skip: next "reason" -->`` is left out.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(files_of_a_reader, tmp_path, dirs_exist_ok=True)
    parsers = [PythonCodeBlockParser(), CodeBlockParser("diff", after_the_change), SkipParser()]
    document = Sybil(parsers).parse(page)
    document.namespace.update(
        __name__="__main__",
        SAMPaTrainer=SAMPaTrainer,
        SAMPaTrainingArguments=SAMPaTrainingArguments,
        model=tiny.bert(0.1),
        model_init=lambda: tiny.bert(),
        args=tiny.arguments("out"),
        dataset=tiny.sentences(16),
        train_dataset=tiny.sentences(16),
        eval_dataset=tiny.sentences(8, seed=2),
    )
    for example in document:
        try:
            example.evaluate()
        except SkipTest as reason:
            assert len(str(reason)) > 20, "a block that is left out says why"


# What a page can show


@on_all_that_is_read
def test_code_fits_the_page(page):
    for token in MarkdownIt().parse(markdown(page)):
        if token.type in ("fence", "code_block") and token.info not in ("{eval-rst}", "mermaid"):
            for line in token.content.splitlines():
                assert len(line) <= WIDTH, line


@on_all_that_is_read
def test_github_draws_the_formulas(page):
    """It reads Markdown first: what that would take for an escape or for emphasis must not be in a line's formula."""
    for token in MarkdownIt().parse(markdown(page)):
        if token.type == "inline":
            for formula in re.findall(r"\$([^$]+)\$", re.sub(r"`[^`]*`", "", token.content)):
                assert not re.search(r"\\[^A-Za-z]|}_|[*<|]", formula), formula


def test_a_symbol_with_a_tilde_has_its_index_where_others_have_it(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from mathml import mathml

    assert '<msub><mover accent="true"><mi>x</mi><mo stretchy="false">~</mo></mover><mi>t</mi></msub>' in mathml(
        r"\tilde x_t", as_block=False
    )
    assert mathml(r"x_t", as_block=True).startswith('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"')


# Commands


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's bash blocks, without comments and variables."""
    found = []
    for block in Sybil([CodeBlockParser("bash", lambda example: None)]).parse(page):
        for line in re.sub(r"\\\n", " ", block.parsed).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            found += [words] if words else []
    return found


def check_script(script: str, arguments: list[str]) -> None:
    """That there is such a script, and that it takes these arguments. ``script.py`` is the reader's own."""
    if script == "script.py":
        return
    assert (ROOT / script).is_file()
    parse = {
        "glue/run_classification.py": classification_arguments.parse_args,
        "glue/run_glue.py": glue_arguments.parse_args,
        "glue/make_sample.py": run_make_sample,
        "vit_finetune/run_vit.py": vit_arguments.parse_args,
    }
    parse[script](arguments)


def run_make_sample(arguments: list[str]) -> None:
    assert "--tiny_bert" in arguments, "it would write to the repository"
    with patch.object(sys, "argv", ["make_sample.py", *arguments]):
        make_sample.main()


def check_accelerate(words: list[str]) -> None:
    assert words[0] == "launch"
    launched = launch_command_parser().parse_args(words[1:])
    if launched.config_file:
        assert (ROOT / launched.config_file).is_file()
    check_script(launched.training_script, launched.training_script_args)


def check_torchrun(words: list[str]) -> None:
    launched = torchrun_parser().parse_args(words)
    check_script(launched.training_script, launched.training_script_args)


def words_of_a_run(compared: config.Comparison) -> list[str]:
    """Of the first run that is scored, which has the arguments of all."""
    run = next(scored(compared, {(task, method): {} for task in compared.tasks for method in compared.methods}, {}))
    return config.as_words({**run.arguments, "output_dir": "out"})


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "hf_sampa.variants"]:
        catalogue.main(words[2:])
    elif words[:3] == ["-m", "hf_sampa", "launch"]:
        launched = launch.parser().parse_args(words[3:])
        check_script(launched.training_script, launched.training_script_args)
    elif words[:2] == ["-m", "hf_sampa.compare"]:
        if "--help" not in words:
            compared = config.read(ROOT / comparison.parser().parse_args(words[2:]).config)
            check_script(str(compared.script.relative_to(ROOT)), words_of_a_run(compared))
    elif words[:3] == ["-m", "hf_sampa", "plan"]:
        plan.parser().parse_args(words[3:])
    elif words[:2] == ["-m", "hf_sampa"]:
        command_line.main(words[2:])
    else:
        check_script(words[0], words[1:])


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


CHECKS = {
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "python": check_python,
    "make": check_make,
    "pip": lambda words: None,
    "tensorboard": lambda words: None,
}


@on_every_page
def test_the_commands_are_taken(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program, *words in commands(page):
        try:
            CHECKS[Path(program).name](words)
        except SystemExit as refused:
            assert not refused.code, f"{program} {shlex.join(words)}"


def test_a_wrong_command_would_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = "launch --config_file accelerate_configs/gpu_2.yaml glue/run_glue.py --task_name rte --output_dir out"
    check_accelerate(launch.split())
    for good, bad in (("gpu_2", "gpu_3"), ("glue.py", "glu.py"), ("--task_name", "--tusk_name"), (" rte", " rta")):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            check_accelerate(launch.replace(good, bad).split())
    with pytest.raises(AssertionError):
        check_make(["tset"])
    for wrong in ("hf_sampa.variants vaso", "hf_sampa launch --config gpu_3 script.py", "hf_sampa config gpu_3"):
        with pytest.raises(SystemExit):
            check_python(["-m", *wrong.split()])


# Links


def slugs(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them, and of the sections that its catalogue will have."""
    tokens = MarkdownIt().parse(markdown(page))
    titles = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    found = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return found | (set(VARIANTS) if "{catalogue} entries" in markdown(page) else set())


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, inside the repository."""
    inline = [child for token in MarkdownIt().parse(markdown(page)) for child in token.children or []]
    found = [child.attrGet("href") or child.attrGet("src") for child in inline if child.attrs]
    return [link for link in found if link and not re.match(r"https?:", link)]


@on_all_that_is_read
def test_links_lead_to_what_is_there(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_the_readme_is_short_and_leads_to_the_documentation():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    assert "docs/index.md" in links(ROOT / "README.md")


# The build


@pytest.mark.whole
def test_it_builds_without_a_warning_and_without_a_network(tmp_path):
    build = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "-q"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*build, "-d", tmp_path / "doctrees", DOCS, tmp_path / "html"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    built = {page.stem: (tmp_path / "html" / page.with_suffix(".html").name).read_text() for page in DOCS.glob("*.md")}
    built |= {
        f"notebooks/{path.stem}": (tmp_path / "html" / "notebooks" / f"{path.stem}.html").read_text()
        for path in notebooks.NOTEBOOKS
    }
    for name, html in built.items():
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"https?:", html), f"{name} loads from elsewhere"
        assert "<merror" not in html and not re.search(
            r"\$\\?[a-zA-Z]", re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
        )
        assert name == "index" or f'href="{name}.html"' in built["index"]
    assert all(f'id="{name.replace("_", "-")}"' in built["variants"] for name in VARIANTS)
    assert 'MathML" display="block">' in built["how_it_works"]
    assert "<math" in built["variants"].partition('id="entries"')[2], "symbols of the catalogue are typeset"
    assert "<td><p><code" in built["contributing"].partition("imports from")[2], "the rooms are a table"


# The pictures


def test_the_pictures_are_what_their_script_draws(tmp_path):
    drawings = runpy.run_path(str(DOCS / "figures.py"))
    drawings["write"](tmp_path)
    for name in drawings["DRAWINGS"]:
        assert (tmp_path / name).read_bytes() == (DOCS / name).read_bytes(), name


@pytest.mark.parametrize("name", ["step.svg", "two_processes.svg"])
def test_no_label_of_a_picture_lies_on_another(name):
    figure = runpy.run_path(str(DOCS / "figures.py"))["DRAWINGS"][name]()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.axes and text.get_visible()]
    texts = [text for text in texts if text in text.axes.texts]
    assert len(texts) > 12
    boxes = {text.get_text() + str(text.get_position()): text.get_window_extent(renderer) for text in texts}
    for (one, its_box), (other, other_box) in combinations(boxes.items(), 2):
        assert not its_box.overlaps(other_box), (one, other)
    for text, box in boxes.items():
        assert all(figure.bbox.contains(*corner) for corner in box.corners()), f"{text} leaves the picture"
