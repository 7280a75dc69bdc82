"""The command line of a script: a file of arguments, defaults of a task or method, those of a variant, and what has no effect."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from transformers import HfArgumentParser

from ...cards import declare_options
from ...variants import find
from ..training_arguments import FineTuningArguments
from .arguments_file import perhaps, without_file
from .parser import given_by


logger = get_logger(__name__)

# Settings that a method does not read.
UNUSED = {"adamw": ("rho", "lmbda", "variant", "variant_args"), "sam": ("lmbda",), "sampa": ()}


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
        NotADirectoryError: `output_dir` is a file, or below one.
        ValueError: a setting is impossible.
        SystemExit: a word is not understood; says which.
    """
    words = without_file(parser, sys.argv[1:] if argv is None else argv)
    declare_options(*parser.dataclass_types, words=words if argv is None else None)
    parser.set_defaults(**defaults(given_by(parser, words)))
    _take_defaults_of_variant(parser, given_by(parser, words).variant)
    _, unknown = parser.parse_known_args(words)
    if unknown:
        option = unknown[0].partition("=")[0]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{perhaps(option, parser._option_string_actions)}")
    try:
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        # Of a setting, whichever library found it: said from here, it is the user's, see `run_main`.
        raise ValueError(str(error)) from error
    _warn_of_unused(parser, words, parsed[-1])
    parsed[-1].check_output_dir()
    return parsed


def _take_defaults_of_variant(parser: HfArgumentParser, name: str) -> None:
    variant = find(name)
    rho = parser.get_default("rho")
    parser.set_defaults(rho=variant.rho if rho is None else round(rho * variant.rho / find("sam").rho, 12))
    if variant.lmbda is not None or parser.get_default("lmbda") is None:
        parser.set_defaults(lmbda=0.2 if variant.lmbda is None else variant.lmbda)


def _warn_of_unused(parser: HfArgumentParser, words: list[str], args: FineTuningArguments) -> None:
    method, radius_is_rho = args.method, args.diagnostics_steps and args.diagnostics_radius is None
    # argparse leaves alone what a namespace holds already, so that a default does not look as if it had been given.
    given = vars(parser.parse_known_args(words, Namespace(**dict.fromkeys(UNUSED[method])))[0])
    names = [name for name in UNUSED[method] if not (name == "rho" and radius_is_rho)]
    unused = [f"--{name} {given[name]}" for name in names if given[name] is not None]
    if unused:
        logger.warning(
            f"--method {method} does not use {' or '.join(unused)}. Leave out what has no effect, or choose another --method."
        )
