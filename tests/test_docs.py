"""The documentation: its code runs, its commands are taken, its links lead somewhere, and it builds without a warning."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from unittest import SkipTest
from unittest.mock import patch

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

import hf_sampa.variants.__main__ as catalogue
from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.variants import VARIANTS
from tests import tiny


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
on_every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


# Python blocks


def after_the_change(example: Example) -> None:
    """Run what a diff leaves."""
    lines = [line[2:] for line in example.parsed.splitlines() if not line.startswith("-")]
    exec("\n".join(lines), example.namespace)


@on_every_page
def test_the_code_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in order, in an empty folder, with what a reader brings: a model, arguments and data.

    A block after a line ``<!-- skip: next "reason" -->`` is left out.
    """
    monkeypatch.chdir(tmp_path)
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


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "hf_sampa.variants"]:
        catalogue.main(words[2:])
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
    with pytest.raises(SystemExit):
        check_python(["-m", "hf_sampa.variants", "vaso"])


# Links


def slugs(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them, and of the sections that its catalogue will have."""
    tokens = MarkdownIt().parse(page.read_text())
    titles = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    found = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return found | (set(VARIANTS) if "{catalogue} entries" in page.read_text() else set())


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, inside the repository."""
    inline = [child for token in MarkdownIt().parse(page.read_text()) for child in token.children or []]
    found = [child.attrGet("href") or child.attrGet("src") for child in inline if child.attrs]
    return [link for link in found if link and not re.match(r"https?:", link)]


@on_every_page
def test_links_lead_to_what_is_there(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_the_readme_leads_to_the_documentation():
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
    for name, html in built.items():
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"https?:", html), f"{name} loads from elsewhere"
        assert name == "index" or f'href="{name}.html"' in built["index"]
    assert all(f'id="{name.replace("_", "-")}"' in built["variants"] for name in VARIANTS)


# The picture


def test_the_picture_is_what_its_script_draws(tmp_path):
    runpy.run_path(str(DOCS / "figures.py"))["write"](tmp_path / "two_processes.svg")
    assert (tmp_path / "two_processes.svg").read_bytes() == (DOCS / "two_processes.svg").read_bytes()


def test_no_label_of_the_picture_lies_on_another():
    figure = runpy.run_path(str(DOCS / "figures.py"))["two_processes"]()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.axes and text.get_visible()]
    texts = [text for text in texts if text in text.axes.texts]
    assert len(texts) > 20
    boxes = {text.get_text() + str(text.get_position()): text.get_window_extent(renderer) for text in texts}
    for (one, its_box), (other, other_box) in combinations(boxes.items(), 2):
        assert not its_box.overlaps(other_box), (one, other)
    for text, box in boxes.items():
        assert all(figure.bbox.contains(*corner) for corner in box.corners()), f"{text} leaves the picture"
