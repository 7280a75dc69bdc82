"""One stream of update batches B_0, B_1, ... that both roles read, the same after every resume.

Loaders are used as they are given; a sample's randomness belongs to the sample.
"""

from .batches import MicroBatch, Place, UpdateBatch, UpdateStream
from .loaders import check_samplers, prepare_and_remember, replica_loader, seeded_loader, set_halves
from .seeded_data import INDICES


__all__ = [
    "INDICES",
    "MicroBatch",
    "Place",
    "UpdateBatch",
    "UpdateStream",
    "check_samplers",
    "prepare_and_remember",
    "replica_loader",
    "seeded_loader",
    "set_halves",
]
