"""The step itself: g_t, the perturbation, the look-ahead, g~_t and their mix, in both timings, on any base optimizer.

Start with `sampa.py`, which is Algorithm 2 of the paper; `hf_sampa.functional` has its arithmetic. Knows nothing of transformers.
"""

from .buckets import Buckets
from .gradients import Backward, Gradients
from .passes import Batch, Found, Pass, StepReport
from .per_sample import SampleView, check_classes, logits_of, recipe_loss
from .placement import Placement
from .precision import SharedGradScaler
from .sam import SAM
from .sampa import SAMPa
from .shared import Shared, check_separable, check_whole
from .trained import Trained


__all__ = [
    "SAM",
    "Backward",
    "Batch",
    "Buckets",
    "Found",
    "Gradients",
    "Pass",
    "Placement",
    "SAMPa",
    "SampleView",
    "Shared",
    "SharedGradScaler",
    "StepReport",
    "Trained",
    "check_classes",
    "check_separable",
    "check_whole",
    "logits_of",
    "recipe_loss",
]
