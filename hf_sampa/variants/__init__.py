"""Sharpness-aware methods as recipes: the catalogue, and how to get a recipe out of it."""

from . import recipes  # noqa: F401 - fills the catalogue
from .catalogue import VARIANTS, Variant, find, parse_arguments


__all__ = ["VARIANTS", "Variant", "find", "parse_arguments"]
