"""What a sharpness-aware step is made of: the parts, the recipe that joins them, and the catalogue of methods.

Pure arithmetic on tensors: knows nothing of processes and of transformers. ``python -m hf_sampa.variants`` prints the catalogue.
"""

from .adapters import OWN, Adapters
from .catalogue import VARIANTS, Variant, find, parse_arguments
from .parts import Direction, Mask, Mixing, Moment, Norms, When
from .recipe import Recipe, check_recipe
from .sample_parts import Loss, Samples, Seen


# They fill the catalogue.
from . import recipes  # noqa: F401  # isort: skip


__all__ = [
    "OWN",
    "VARIANTS",
    "Adapters",
    "Direction",
    "Loss",
    "Mask",
    "Mixing",
    "Moment",
    "Norms",
    "Recipe",
    "Samples",
    "Seen",
    "Variant",
    "When",
    "check_recipe",
    "find",
    "parse_arguments",
]
