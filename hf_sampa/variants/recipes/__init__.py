"""The entries of the catalogue: each paper's method as a recipe, with its defaults. Importing them fills the catalogue, in this order."""

from . import weights  # noqa: F401  # isort: skip
from . import samples  # noqa: F401  # isort: skip
from . import adapters  # noqa: F401  # isort: skip
