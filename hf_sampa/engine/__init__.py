"""The step itself: g_t, the perturbation, the look-ahead, g~_t and their mix, in both timings, on any base optimizer.

Start with `sampa.py`, which is Algorithm 2 of the paper; `hf_sampa.functional` has its arithmetic. Knows nothing of transformers.
"""

from .buckets import Buckets
from .msam import MSAM, MSAMPa, TwoLossSAMPa
from .passes import StepReport
from .per_sample import SampleView, check_classes, logits_of, recipe_loss
from .precision import SharedGradScaler
from .sam import SAM
from .sampa import SAMPa
from .sharding import ShardedSAMPa, check_separable
from .trained import Trained


__all__ = [
    "MSAM",
    "SAM",
    "Buckets",
    "MSAMPa",
    "SAMPa",
    "SampleView",
    "ShardedSAMPa",
    "SharedGradScaler",
    "StepReport",
    "Trained",
    "TwoLossSAMPa",
    "check_classes",
    "check_separable",
    "logits_of",
    "recipe_loss",
]
