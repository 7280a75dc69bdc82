"""What surrounds the code: workflows, templates, the changelog, the citation. They name things that exist, and agree."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
import yaml

from hf_sampa import __version__
from hf_sampa.cards.citations import ENTRIES, METHODS
from tests.project import PYPROJECT, ROOT
from tests.test_docs import slugs


FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yml"))
FORMS = sorted((FORGE / "ISSUE_TEMPLATE").glob("*_*.yml"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", FORGE / "pull_request_template.md"]
HOME = "https://github.com/hf-sampa/hf_sampa"
PROJECT = PYPROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())

# By the names that check-jsonschema has for them.
SCHEMAS = {
    "citation-file-format": [ROOT / "CITATION.cff"],
    "dependabot": [FORGE / "dependabot.yml"],
    "github-issue-config": [FORGE / "ISSUE_TEMPLATE" / "config.yml"],
    "github-issue-forms": FORMS,
    "github-workflows": WORKFLOWS,
}


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def jobs() -> list[dict]:
    return [job for path in WORKFLOWS for job in read(path)["jobs"].values()]


def scripts() -> list[str]:
    """What the steps of the workflows run."""
    return [step["run"] for job in jobs() for step in job["steps"] if "run" in step]


def tool(name: str) -> str:
    """A program of the environment, or of the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return shutil.which(name, path=path) or pytest.skip(f"{name} is not installed")


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# Linters


def test_actionlint_finds_nothing():
    found = run(tool("actionlint"), *WORKFLOWS)
    assert found.returncode == 0, found.stdout


def test_zizmor_finds_nothing():
    found = run(tool("zizmor"), "--offline", "--pedantic", "--quiet", FORGE)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_keep_to_their_schema(schema):
    found = run(tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema])
    assert found.returncode == 0, found.stdout


def test_every_action_is_one_commit_with_its_version_beside_it():
    pinned = {}
    for path in WORKFLOWS:
        for action, rest in re.findall(r"uses: ([^@\s]+)(.*)", path.read_text()):
            assert re.fullmatch(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+", rest), f"{path.name}: {action}{rest}"
            assert pinned.setdefault(action, rest) == rest, f"{path.name}: {action}"


# What is named exists


def test_make_targets():
    targets = set(re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [*scripts(), *(path.read_text() for path in PAGES)]
    named = [target for text in texts for target in re.findall(r"(?:^|`)make ([a-z.-]+)", text, re.MULTILINE)]
    assert len(named) > 10 and set(named) <= targets


def test_nox_sessions():
    pytest.importorskip("nox")
    listed = run(sys.executable, "-m", "nox", "--list-sessions", "--json")
    assert listed.returncode == 0, listed.stderr
    sessions = {session["session"] for session in json.loads(listed.stdout)}
    matrix = read(FORGE / "workflows" / "versions.yml")["jobs"]["versions"]["strategy"]["matrix"]["include"]
    named = [each["session"] for each in matrix]
    named += [name for text in scripts() for name in re.findall(r'nox -s "([^$"]+)"', text)]
    assert len(named) == 4 and set(named) <= sessions


def test_extras():
    named = [extra for text in scripts() for extra in re.findall(r"\.\[([\w,]+)\]", text)]
    assert named and {each for extra in named for each in extra.split(",")} <= set(PROJECT["optional-dependencies"])


def test_constraints_and_cached_files():
    """By the options that name files."""
    named = [step["with"] for job in jobs() for step in job["steps"] if "with" in step]
    files = [file for options in named for key in options if "dependency" in key for file in options[key].split()]
    files += [file for text in scripts() for file in re.findall(r"--constraints (\S+)", text)]
    assert files and all((ROOT / file).is_file() for file in files), files


def test_links_into_the_repository_lead_somewhere():
    """They are absolute: in a form or in a pull request, relative ones would not be of the repository."""
    files = [*FORGE.rglob("*.*"), *ROOT.glob("*.*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".cff", ".md", ".yml")}
    links = [link for text in texts.values() for link in re.findall(rf"{HOME}/blob/main/([^)\s\"]+)", text)]
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).is_file() and (not anchor or anchor in slugs(ROOT / path)), link
    for path in (FORGE / "pull_request_template.md", *FORMS):
        assert not re.search(r"\]\((?!https:)", texts[path]), path


def test_the_command_for_versions_prints_them():
    form = next(path for path in FORMS if path.name == "bug_report.yml")
    fields = {field["id"]: field["attributes"] for field in read(form)["body"] if "id" in field}
    command = re.search(r"```bash\n(.*?)\n```", fields["versions"]["description"], re.DOTALL)[1]
    python, *arguments = shlex.split(command)
    printed = run(sys.executable, *arguments)
    assert python == "python" and printed.returncode == 0, printed.stderr
    for name in ("hf_sampa", "torch", "transformers", "accelerate"):
        assert f"{name} {version_of(name)}" in printed.stdout.splitlines()


# Versions of Python


def test_pythons_of_the_workflows_are_those_of_the_classifiers():
    listed = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each) for each in PROJECT["classifiers"]]
    classifiers = {match[1] for match in listed if match}
    assert {floor(PROJECT["requires-python"])} == {min(classifiers, key=number)}
    tested = read(FORGE / "workflows" / "tests.yml")["jobs"]
    pythons = tested["tests"]["strategy"]["matrix"]["python-version"]
    assert {*pythons, *(step["with"].get("python-version") for step in set_up(tested["lowest"]))} == classifiers
    assert {python for job in jobs() for python in pythons_of(job)} <= classifiers


def floor(requires: str) -> str:
    return re.match(r">=(3\.\d+)", requires)[1]


def number(python: str) -> int:
    return int(python.partition(".")[2])


def set_up(job: dict) -> list[dict]:
    """Steps that ask for a Python."""
    return [step for step in job["steps"] if "python-version" in step.get("with", {})]


def pythons_of(job: dict) -> list[str]:
    matrix = job.get("strategy", {}).get("matrix", {})
    found = [*matrix.get("python-version", []), *(each["python-version"] for each in matrix.get("include", []))]
    given = [step["with"]["python-version"] for step in set_up(job)]
    return found + [python for python in given if "matrix" not in python]


# Changelog and citation


def test_the_changelog_ends_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", title) for title in titles[1:]]
    assert titles[0] == "[Unreleased]" and all(releases), titles
    versions = [release[1] for release in releases]
    days = [datetime.date.fromisoformat(release[2]) for release in releases]
    assert versions[0] == __version__ and days == sorted(days, reverse=True)
    assert versions == sorted(set(versions), key=lambda each: [*map(int, each.split("."))], reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
    links = dict(re.findall(r"^\[(\S+)\]: (\S+)$", text, re.MULTILINE))
    expected = {"Unreleased": f"{HOME}/compare/v{versions[0]}...HEAD"}
    expected |= {new: f"{HOME}/compare/v{old}...v{new}" for new, old in zip(versions, versions[1:], strict=False)}
    assert links == {**expected, versions[-1]: f"{HOME}/releases/tag/v{versions[-1]}"}


def test_the_citation_is_of_this_version():
    assert CITATION["version"] == __version__ and CITATION["repository-code"] == HOME
    assert f"## [{__version__}] - {CITATION['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    assert (CITATION["title"], CITATION["abstract"]) == (PROJECT["name"], PROJECT["description"])
    assert (CITATION["license"], CITATION["authors"]) == (PROJECT["license"], PROJECT["authors"])


def test_the_paper_is_the_one_that_cards_cite():
    entry = ENTRIES[METHODS["sampa"]].replace("{SAMPa}", "SAMPa")
    fields = dict(re.findall(r"^  (\w+) = {(.*)},$", entry, re.MULTILINE))
    paper = CITATION["preferred-citation"]
    assert (paper["title"], str(paper["year"])) == (fields["title"], fields["year"])
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) == fields["author"]
    assert paper["collection-title"] == fields["booktitle"]
    assert paper["url"] == f"https://arxiv.org/abs/{fields['eprint']}"
    assert [each["value"] for each in paper["identifiers"]] == [f"arXiv:{fields['eprint']}"]


# The steps of a release


def release_step(name: str) -> str:
    """What the step of this name runs."""
    job = read(FORGE / "workflows" / "release.yml")["jobs"]["build"]
    return next(step["run"] for step in job["steps"] if step.get("name") == name)


def run_step(name: str, folder: Path, tag: str) -> subprocess.CompletedProcess:
    """As GitHub runs it, in a folder with what it reads."""
    return subprocess.run(
        ["bash", "-e", "-c", release_step(name)],
        cwd=folder,
        env={**os.environ, "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_tag_has_to_name_the_version():
    step = "The tag names the version"
    assert run_step(step, ROOT, f"v{__version__}").returncode == 0
    for tag in ("v9.9.9", __version__, f"v{__version__}rc1"):
        refused = run_step(step, ROOT, tag)
        assert refused.returncode == 1
        assert refused.stdout == (
            f"::error::Expected the tag v{__version__}, as hf_sampa/__init__.py has it; got {tag}. Tag again.\n"
        )


def test_a_release_says_what_the_changelog_says(tmp_path):
    step = "The changelog says what is in it"
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.1.0] - 2026-02-01\n\n### Added\n\n- One, see [1.0.0].\n\n"
        "## [1.0.0] - 2026-01-01\n\n- Two.\n\n[1.0.0]: https://example.org\n"
    )
    for tag, notes in {"v1.1.0": "### Added\n\n- One, see [1.0.0].", "v1.0.0": "- Two."}.items():
        assert run_step(step, tmp_path, tag).returncode == 0
        assert (tmp_path / "notes.md").read_text().strip() == notes
    changelog.write_text(changelog.read_text().replace("- Two.\n", ""))
    for tag in ("v1.0.0", "v1.0", "v2.0.0"):
        refused = run_step(step, tmp_path, tag)
        assert refused.returncode == 1
        assert refused.stdout == (
            f"::error::Expected a section [{tag[1:]}] in CHANGELOG.md; got none, or an empty one. Write it.\n"
        )
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    assert run_step(step, tmp_path, f"v{__version__}").returncode == 0
    notes = (tmp_path / "notes.md").read_text()
    assert "### Added" in notes and "## [" not in notes and HOME not in notes
