"""Both gradients of a SAMPa step in one pass over the frozen weights, on one process: for adapters.

x~_t and y_{t+1} differ in what is trained, and share what is frozen. Each pass is taken as it would be alone, on its own batch, weights
and random numbers, but where both come to a block of the model, or to a frozen layer, it is computed for both. Begin with `one_pass.py`.
"""

from .one_pass import OnePass
from .own import Attributes, Views


__all__ = ["Attributes", "OnePass", "Views"]
