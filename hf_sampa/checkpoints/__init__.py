"""What is saved and how a run goes on: which files, in which order, and how whole ones are told from torn ones.

`checkpoint.py` says what is written; `saving.py` when; `resume.py` how a run goes on.
"""

from .checkpoint import inspect, is_whole, last_whole, steps_in
from .in_parts import no_weights, remove_no_weights
from .resume import Resume, load_missing, load_weights, loading
from .saved_weights import contiguous
from .saving import Saving, check_trained
from .shards import as_any_other, as_saved, optimizer_as_saved, whole_weights
from .whole import WEIGHT_AVERAGE


__all__ = [
    "WEIGHT_AVERAGE",
    "Resume",
    "Saving",
    "as_any_other",
    "as_saved",
    "check_trained",
    "contiguous",
    "inspect",
    "is_whole",
    "last_whole",
    "load_missing",
    "load_weights",
    "loading",
    "no_weights",
    "optimizer_as_saved",
    "remove_no_weights",
    "steps_in",
    "whole_weights",
]
