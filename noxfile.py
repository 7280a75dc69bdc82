"""The tests against other versions of what this package is built on: ``make test-versions``.

Each set of versions has a virtual environment of its own. What they showed stands in a table at the end, and in
``out/versions/``. One set by itself: ``nox -s "versions(lowest)"``; single tests: ``nox -s "versions(lowest)" -- tests/test_engine.py``.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox


nox.needs_version = ">=2025.10"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True

FOLDER = Path("out/versions")
SHOWN = ["transformers", "torch", "accelerate", "numpy", "huggingface_hub", "trl", "sentence-transformers"]
INSTALLED = "import json; from importlib.metadata import distributions as d; print(json.dumps({e.name: e.version for e in d()}))"
# Python, and what uv is told. pyproject.toml has the bounds.
SETS = {
    "lowest": ("3.10", ["--resolution", "lowest-direct"]),
    "middle": ("3.12", ["torch==2.9.1", "transformers==5.12.1", "accelerate==1.13.0"]),
    "newest": ("3.13", ["--upgrade"]),
}
# Of the project itself: its pages, its rules, its pins, the hub of its tests. They hold for one set of versions, that of
# constraints.txt.
NOT_OF_VERSIONS = [
    "tests/mutation",
    "tests/test_configs.py",
    "tests/test_docs.py",
    "tests/test_house.py",
    "tests/test_hub.py",
    "tests/test_mutation.py",
    "tests/test_notebooks.py",
    "tests/test_package.py",
    "tests/test_project.py",
]


@nox.session
@nox.parametrize(
    ("python", "name"),
    [nox.param(python, name, id=name) for name, (python, _) in SETS.items()],
)
def versions(session: nox.Session, name: str) -> None:
    """The tests of every property, without those of the project itself."""
    session.install("-e", ".[tests]", *SETS[name][1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(session.run("python", "-c", INSTALLED, silent=True), "utf-8")
    session.notify("table")
    left = [f"--ignore={path}" for path in NOT_OF_VERSIONS] if not session.posargs else []
    session.run(
        *("python", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={FOLDER / name}.xml"),
        *("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *left, *session.posargs),
        env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


@nox.session(venv_backend="none", default=False)
def table(session: nox.Session) -> None:
    """What was installed, and how many tests passed, of every set that was run."""
    rows = [["", "Python", *SHOWN, "passed", "failed", "skipped", "minutes"]]
    for name, (python, _) in SETS.items():
        if (FOLDER / f"{name}.xml").is_file():
            rows.append([name, python, *_installed(name), *_counted(name)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())


def _installed(name: str) -> list[str]:
    found = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return [found.get(package, found.get(package.replace("_", "-"), "-")) for package in SHOWN]


def _counted(name: str) -> list[str]:
    suite = ElementTree.parse(FOLDER / f"{name}.xml").getroot().find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return [str(passed), str(failed), str(skipped), f"{float(suite['time']) / 60:.1f}"]
