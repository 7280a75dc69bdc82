"""How a run was started, and with what, for its model card; without secrets."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


PACKAGES = ("hf_sampa", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
# By which launchers say what a command line does not.
VARIABLES = ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
# Names of what is not to be shown, and what makes a token or key one of a tokenizer or a data set.
SECRET = re.compile(
    r"(?<![a-z])(?:secrets?|pass(?:word|wd|phrase)|pwd|credentials?|auth|authorization)(?![a-z])"
    r"|api_?(?:keys?|tokens?)(?![a-z])|(?<![a-z])(?:keys?|token)$|(?:access|auth|hub|hf)_tokens$"
)
HARMLESS = re.compile(
    r"(?:pad|eos|bos|unk|sep|cls|mask|start|end|special|max|min|text|sentence|label|image|audio|sort|group|column|input)\d*"
    r"_(?:token|key)s?$"
)
SECRET_VALUE = re.compile(
    r"(?:hf_|ghp_|sk-)[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@|bearer\s|[\"'?&_\s](?:token|password|secret|api_?key)[\"']?\s*[:=]",
    re.IGNORECASE,
)


def is_secret(name: str, value: Any = "") -> bool:
    """Whether an option or field of this name, or with this value, is not to be shown."""
    plain = re.sub(r"[-.]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()).strip("_")
    return bool((SECRET.search(plain) and not HARMLESS.search(plain)) or SECRET_VALUE.search(str(value)))


def command(world_size: int, resumed: bool = False) -> str:
    """How this process, and its peers, were started; without secrets.

    Args:
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
        nodes = ["--nnodes", str(world_size // on_this_node)] if world_size > on_this_node else []
        start = ["torchrun", *nodes, "--nproc_per_node", str(on_this_node)]
    given = {name: os.environ.get(name, "no") for name in VARIABLES}
    variables = "".join(f"{name}={value} " for name, value in given.items() if value.lower() not in ("no", ""))
    return f"```bash\n{variables}{shlex.join([*start, *script, *_words(sys.argv[1:], resumed)])}\n```"


def _script() -> list[str] | None:
    """The script or ``-m`` and the module that Python runs; None for a notebook or an interpreter."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return None if "ipykernel" in spec.name else ["-m", spec.name.removesuffix(".__main__")]
    return [sys.argv[0]] if sys.argv[0].endswith(".py") and "ipykernel" not in sys.argv[0] else None


def _words(given: list[str], resumed: bool) -> list[str]:
    words, before = [], ""  # the option whose values these are
    for word in given:
        name, equals, value = word.partition("=")
        option = word.startswith("--") or (word.startswith("-") and not is_secret(before))
        if (name if option else before).replace("-", "_") == "__resume_from_checkpoint" and not resumed:
            pass
        elif is_secret("" if option else before, word):
            words.append("HIDDEN" if not (option and equals) else f"{name}=HIDDEN")
        else:
            words.append(f"{name}=HIDDEN" if equals and is_secret(name, value) else word)
        if option:
            before = "" if equals else word
        elif not is_secret(before):
            before = ""
    return words


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
