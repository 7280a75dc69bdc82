"""What code changes besides its results: remembered, put back, seeded, and made the same on all processes.

A step runs a model several times for one batch; this room sees to it that it counts once.
"""

from .collected import Collected
from .fingerprints import fingerprint, fingerprint_of_bits, fingerprint_of_print
from .forward_state import ForwardState, make_room
from .modules import other_modules
from .randomness import (
    FirstState,
    GlobalState,
    OwnGenerator,
    OwnGenerators,
    derive_seed,
    generators_in,
    own_generators,
    seed_all,
    seed_globals,
    seed_own,
    seeded,
    unseeded,
)
from .stand_in import holding, stood_in
from .undo import Remembered


__all__ = [
    "Collected",
    "FirstState",
    "ForwardState",
    "GlobalState",
    "OwnGenerator",
    "OwnGenerators",
    "Remembered",
    "derive_seed",
    "fingerprint",
    "fingerprint_of_bits",
    "fingerprint_of_print",
    "generators_in",
    "holding",
    "make_room",
    "other_modules",
    "own_generators",
    "seed_all",
    "seed_globals",
    "seed_own",
    "seeded",
    "stood_in",
    "unseeded",
]
