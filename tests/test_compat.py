"""Versions: which are refused, which are new, and that every place that names them names the same."""

import inspect

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import Trainer

from hf_sampa import SAMPaMixin, compat
from tests.project import PYPROJECT, ROOT


def installed(monkeypatch, **versions: str) -> None:
    """Have the package see other versions than those that are installed."""
    newest = {name: tested.newest for name, tested in compat.TESTED.items()}
    monkeypatch.setattr(compat, "version", (newest | versions).__getitem__)


def test_a_version_that_is_too_old_is_refused(monkeypatch):
    installed(monkeypatch, transformers="5.2.0")
    with pytest.raises(ImportError) as error:
        compat.check_versions()
    assert str(error.value) == (
        f"hf_sampa needs transformers 5.3.0 or newer (tested: 5.3.0 to {compat.TESTED['transformers'].newest}), but 5.2.0 is "
        "installed: pip install --upgrade 'transformers>=5.3.0'."
    )


def test_shards_on_versions_that_are_too_old_are_refused(monkeypatch):
    monkeypatch.setattr(compat, "before", compat.before.__wrapped__)  # which remembers what it has found
    installed(monkeypatch)
    compat.check_shards()
    installed(monkeypatch, torch="2.6.0", accelerate="1.10.1")
    with pytest.raises(ImportError) as error:
        compat.check_shards()
    assert str(error.value) == (
        "FSDP2: expected torch 2.9, transformers 5.12, accelerate 1.13 or newer, found torch 2.6.0, accelerate 1.10.1. Upgrade, or "
        "train without FSDP, which older ones do, too."
    )


@pytest.mark.parametrize("name", compat.TESTED)
def test_the_lowest_version_and_builds_of_it_are_taken(name, monkeypatch):
    installed(monkeypatch, **{name: f"{compat.TESTED[name].lowest}+cpu"})
    compat.check_versions()


def test_a_trainer_that_was_made_differently_is_refused(monkeypatch):
    """One that lacks a method, and one whose method takes something else."""
    installed(monkeypatch, transformers="5.99.0")

    class Renamed(Trainer):
        _run_epoch = None

        def _save(self, folder): ...

    with pytest.raises(ImportError) as error:
        compat.check_hooks(Renamed)
    tested = compat.TESTED["transformers"]
    assert str(error.value) == (
        "hf_sampa works within Trainer's _run_epoch, _save, which transformers 5.99.0 does not have, or not in this form (tested: "
        f"{tested.lowest} to {tested.newest}): pip install 'transformers=={tested.newest}'."
    )


def test_all_methods_that_the_mixin_extends_are_hooks():
    """Those whose body calls upstream's, so that it has to be there."""
    extended = {
        name
        for name, method in vars(SAMPaMixin).items()
        if inspect.isfunction(method) and f"super().{name}" in inspect.getsource(method) and not name.startswith("__")
    }
    assert extended <= compat.HOOKS.keys()


@pytest.mark.parametrize(
    ("versions", "said"),
    [({}, 0), ({"torch": "2.99.1+cu140"}, 1), ({"torch": "2.99.1", "transformers": "5.98.0.dev0"}, 1)],
)
def test_newer_versions_are_one_line(versions, said, monkeypatch):
    installed(monkeypatch, **versions)
    lines = []
    monkeypatch.setattr(compat.logger, "warning", lines.append)
    compat.say_what_is_untested.cache_clear()
    compat.say_what_is_untested()
    compat.say_what_is_untested()
    assert len(lines) == said
    for line in lines:
        tested = {name: compat.TESTED[name].newest for name in compat.TESTED if name in versions}
        names = ", ".join(f"{name} {versions[name]}" for name in tested)
        assert line == (
            f"{names}: newer than what this hf_sampa was tested with ({', '.join(map(' '.join, tested.items()))}). If something "
            "looks wrong, try that first."
        )


def test_fixes_of_a_tested_version_are_no_news(monkeypatch):
    newest = {
        name: f"{Version(tested.newest).major}.{Version(tested.newest).minor}.99"
        for name, tested in compat.TESTED.items()
    }
    installed(monkeypatch, **newest)
    monkeypatch.setattr(compat.logger, "warning", pytest.fail)
    compat.say_what_is_untested.cache_clear()
    compat.say_what_is_untested()


def test_pyproject_has_the_same_floors():
    wanted = {requirement.name: requirement for requirement in map(Requirement, PYPROJECT["project"]["dependencies"])}
    for name, (lowest, newest) in compat.TESTED.items():
        (floor,) = (each.version for each in wanted[name].specifier if each.operator == ">=")
        assert Version(floor) == Version(lowest)
        assert newest in wanted[name].specifier


def test_the_pins_are_tested_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split())
    for name, (lowest, newest) in compat.TESTED.items():
        assert Version(lowest) <= Version(pins[name]) <= Version(newest)
