"""Sharpness-aware methods as recipes: the catalogue, and how to get a recipe out of it."""

from . import sample_recipes, weight_recipes  # noqa: F401 - fill the catalogue
from .catalogue import VARIANTS, Variant, find, parse_arguments


__all__ = ["VARIANTS", "Variant", "find", "parse_arguments"]
