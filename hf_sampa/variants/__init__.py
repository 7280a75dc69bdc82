"""Sharpness-aware methods as recipes: the catalogue, and how to get a recipe out of it."""

from .catalogue import VARIANTS, Variant, find, parse_arguments


# They fill the catalogue, in this order.
from . import weight_recipes  # noqa: F401  # isort: skip
from . import sample_recipes  # noqa: F401  # isort: skip


__all__ = ["VARIANTS", "Variant", "find", "parse_arguments"]
