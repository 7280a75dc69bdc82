"""The command line of a script: its words, or a file of them, become arguments; what it prints of them."""

from .parse import UNUSED, parse_arguments
from .parser import FineTuningParser


__all__ = ["UNUSED", "FineTuningParser", "parse_arguments"]
