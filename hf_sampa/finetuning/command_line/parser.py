"""The parser of a script: options in groups, SAMPa's own first, each with the default that holds."""

from __future__ import annotations

import dataclasses
import re
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, _StoreFalseAction
from copy import copy
from enum import Enum
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from ...training_args import SAMPaArgumentsMixin
from ..script import is_left_to_another


FILE = 'In place of options, or before them, there may be the name of a JSON file of them, {"output_dir": "out"}; options win over it.'
# What a run does, of all that transformers' arguments have.
OF_THE_RUN = ("output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint")


class FineTuningParser(HfArgumentParser):
    """`HfArgumentParser` for a script's dataclasses, the last of them a `FineTuningArguments`, whose options it groups; an option is what is spelled out."""

    def __init__(self, dataclass_types: Any, epilog: str | None = None, **kwargs: Any):
        epilog = f"{epilog} {FILE}" if epilog else FILE
        super().__init__(dataclass_types, epilog=epilog, formatter_class=OneDefault, allow_abbrev=False, **kwargs)
        known = {field.name for field in dataclasses.fields(TrainingArguments)} - set(OF_THE_RUN)
        sampas = {field.name for field in dataclasses.fields(SAMPaArgumentsMixin)}
        *others, training = self._action_groups
        groups = [
            self.add_argument_group("SAMPa: what a step is"),
            self.add_argument_group("the run: what is done, and with how many examples per update"),
        ]
        for action in [*training._group_actions]:
            if action.dest in sampas or action.dest not in known:
                training._group_actions.remove(action)
                groups[action.dest not in sampas]._group_actions.append(action)
        # In the order of `--help`: what is asked for by name, then what transformers has.
        positional, general, *own = others
        self._action_groups = [positional, general, groups[0], *own, groups[1], training]

    def error(self, message: str) -> NoReturn:
        """Upstream's is said by every process."""
        if is_left_to_another(message):
            self.exit(2)
        super().error(message)


class OneDefault(ArgumentDefaultsHelpFormatter):
    """Shows an option under one name, with one default: as a command line spells it, or what its help says of having none."""

    def _format_action(self, action: Action) -> str:
        shown = copy(action)
        if isinstance(action, _StoreFalseAction):  # which HfArgumentParser adds to switches that are on
            shown.help, shown.default = f"The same as --{action.dest} false.", None
        if isinstance(action.default, Enum):
            shown.default = action.default.value
        names = action.option_strings
        shown.option_strings = [
            name for name in names if "--" + name[2:].replace("-", "_") not in names or "-" not in name[2:]
        ]
        return super()._format_action(shown)

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, []):
            return action.help and re.sub(r" Default: (.*)\.$", r" (default: \1)", action.help)
        return super()._get_help_string(action)


def given_by(parser: ArgumentParser, words: list[str]) -> Namespace:
    """What a command line says, as far as it is understood, with None or the default for the rest; does not ask for what is missing."""
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    try:
        return parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0]
    finally:
        for action in required:
            action.required = True
