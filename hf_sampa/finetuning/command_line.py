"""The command line of a script: defaults of a task or method, those of a variant, and what has no effect."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from transformers import HfArgumentParser

from ..cards import declare_options
from ..variants import find


logger = get_logger(__name__)

# Settings that a method does not read.
UNUSED = {"adamw": ("rho", "lmbda", "variant", "variant_args"), "sam": ("lmbda",), "sampa": ()}


class FineTuningParser(HfArgumentParser):
    """`HfArgumentParser` for a script's dataclasses, the last of them a `FineTuningArguments`."""


def parse_arguments(
    parser: HfArgumentParser,
    argv: list[str] | None = None,
    defaults: Callable[[Namespace], dict[str, Any]] = lambda given: {},
) -> tuple:
    """Read `argv` (the process's own by default) into the parser's dataclasses, the last a `FineTuningArguments`.

    A variant's default of rho is to the parser's, which is SAM's, as the variant's own is to SAM's own; its lambda, if it has
    one, is the default of lambda. Warns of settings that the method does not use. No error, so that one command line can serve all methods.

    Args:
        parser: of the script.
        argv: words; a first one that ends in ``.json`` is a file of arguments by their names, which the others win over.
        defaults: given what the command line says (with None, or the default, for what it does not), the defaults that hold for it,
            by name: those of a task, for instance. ``--help`` shows them.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
    """
    declare_options(*parser.dataclass_types)
    parser.set_defaults(**defaults(parser.parse_known_args(argv)[0]))
    variant = find(parser.parse_known_args(argv)[0].variant)
    if parser.get_default("rho") is not None and variant.rho != find("sam").rho:
        parser.set_defaults(rho=round(parser.get_default("rho") * variant.rho / find("sam").rho, 12))
    if variant.lmbda is not None:
        parser.set_defaults(lmbda=variant.lmbda)
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    method = parsed[-1].method
    # argparse leaves alone what a namespace holds already, so that a default does not look as if it had been given.
    given = vars(parser.parse_known_args(argv, Namespace(**dict.fromkeys(UNUSED[method])))[0])
    unused = [f"--{name} {given[name]}" for name in UNUSED[method] if given[name] is not None]
    if unused:
        logger.warning(
            f"--method {method} does not use {' or '.join(unused)}. Leave out what has no effect, or choose another --method."
        )
    parsed[-1].check_output_dir()
    return parsed
