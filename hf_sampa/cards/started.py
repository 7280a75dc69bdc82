"""How a run was started, and with what, for its model card; without what may be a secret."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY

from .harmless import HIDDEN, is_plain, shown, takes_several, types_of


PACKAGES = ("hf_sampa", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
# By which launchers say what a command line does not, and what it is where they do not say it.
VARIABLES = {"OMP_NUM_THREADS": "", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
OF_FSDP = {
    "ACCELERATE_USE_FSDP": "false",
    "FSDP_VERSION": "1",
    "FSDP_AUTO_WRAP_POLICY": "no_wrap",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "",
    "FSDP_MIN_NUM_PARAMS": "0",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# Of an option that is not declared, and of whose name nothing but words is shown.
OPTION = re.compile(r"-[A-Za-z]|--[A-Za-z]{1,24}\d{0,2}(?:[-_.][A-Za-z]{1,24}\d{0,2})*")
NUMBER = re.compile(r"-[\d.]+(?:[eE][+-]?\d+)?")
CONFIGURATION = (".json", ".yaml", ".yml")

# Of a run that goes into a folder that there is.
OF_THE_FOLDER = ("resume_from_checkpoint", "overwrite_output_dir")

_beside: list[type] = []
_given: list[str] = []


def declare_options(*classes: type, words: list[str] | None = None) -> None:
    """Say what this process's command line has options of besides the training arguments, in place of what was said before.

    Args:
        classes: dataclasses, as `transformers.HfArgumentParser` takes them. Cards show these options as they show those of the
            training arguments, and hide the values of all others.
        words: the command line, where the process's own leaves out a part that is in a file.
    """
    _beside[:], _given[:] = classes, words or []


def command(arguments: type, world_size: int, resumed: bool = False) -> str:
    """How this process, and its peers, were started; what may hold a secret is hidden.

    Args:
        arguments: class of the training arguments.
        world_size: processes.
        resumed: whether the run cannot be had without the checkpoint that it went on from, since something changed there. Any
            other continued run is one that was never stopped, and that is what the command starts.
    """
    script = _script()
    if script is None:
        return "Not from a script: the hyperparameters above are arguments of `SAMPaTrainingArguments`."
    start = ["python"]
    if world_size > 1:
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = ["--nnodes", str(world_size // on_this_node)] if world_size > on_this_node else ["--standalone"]
        start = ["torchrun", *nodes, "--nproc_per_node", str(on_this_node)]
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in _variables())
    # Of the arguments themselves: what is declared beside them may be an earlier script's.
    anew = not resumed and "overwrite_output_dir" in types_of(arguments)
    words = _words(_given or sys.argv[1:], types_of(*_beside, arguments), resumed, anew)
    name = script[0].removeprefix(f"{HIDDEN}/")
    said = "" if name == script[0] else f"Put the folder of `{name}` before its name:\n\n"
    return f"{said}```bash\n{variables}{shlex.join([*start, name, *script[1:], *words])}\n```"


def _variables() -> Iterator[tuple[str, str]]:
    """What a launcher has set in the environment, other than by default; hidden where it is no plain word."""
    # The first of the two is set for training arguments that ask for FSDP, too; those are in the command itself.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and "FSDP_VERSION" in os.environ
    for name, default in {**VARIABLES, **(OF_FSDP if sharded else {})}.items():
        value = os.environ.get(name, default)
        if value.lower() not in (default, ""):
            yield name, value if is_plain(value) or value in FSDP_AUTO_WRAP_POLICY else HIDDEN


def _script() -> list[str] | None:
    """The script or ``-m`` and the module that Python runs; None for a notebook or an interpreter."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return None if "ipykernel" in spec.name else ["-m", spec.name.removesuffix(".__main__")]
    if not sys.argv[0].endswith(".py") or "ipykernel" in sys.argv[0]:
        return None
    return [_path(sys.argv[0])]


def _path(word: str) -> str:
    return shown("output_dir", _from_here(word))


def _from_here(word: str) -> str:
    """`word`, if it is a path into the working folder, from there."""
    inside = os.path.isabs(word) and Path(word).is_relative_to(Path.cwd())
    return str(Path(word).relative_to(Path.cwd())) if inside else word


def _words(given: list[str], declared: dict[str, Any], resumed: bool, anew: bool) -> list[str]:
    """The words of a command line, those that may be secrets hidden.

    Whether an option that is not declared takes a value is known to the script alone: the word after it is taken for one.

    Args:
        given: the words.
        declared: types of the options that are known.
        resumed: whether the run goes on in its folder.
        anew: whether it needs another folder, since the script refuses one that is not empty.
    """
    words: list[str] = []
    name, values = "", 0  # the last option, and how many words have followed it
    for word in given:
        option, equals, value = word.partition("=")
        own = option.lstrip("-").replace("-", "_")
        known = option.startswith("--") and (own in declared or declared.get(own.removeprefix("no_")) is bool)
        waits = name and not values and declared.get(name) is not bool
        if not word.startswith("-") or NUMBER.fullmatch(word):
            values += 1
            takes = name and (values == 1 or takes_several(declared.get(name)))
            found = shown(name, _from_here(word), declared.get(name)) if takes else _alone(word)
        elif known or not (waits or _may_be_secret(option)):
            name, values = own, len(equals)
            found = f"{option}={shown(own, _from_here(value), declared.get(own))}" if equals else option
        else:
            found = HIDDEN
        if anew and values == 1 and name == "output_dir":
            found = f"{found.rstrip('/')}-again"
        if values > 1 or name not in (("overwrite_output_dir",) if resumed else OF_THE_FOLDER):
            words.append(found)
    return words


def _may_be_secret(option: str) -> bool:
    return not (OPTION.fullmatch(option) and is_plain(option.lstrip("-")))


def _alone(word: str) -> str:
    """A word of no option; one that names a file of arguments is shown."""
    return _path(word) if word.endswith(CONFIGURATION) else HIDDEN


def versions() -> dict[str, str]:
    """Of Python and the libraries that a run rests on, those that are installed."""
    found = {package: _version(package) for package in PACKAGES}
    return {"Python": platform.python_version()} | {package: each for package, each in found.items() if each}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
