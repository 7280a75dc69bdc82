"""Who takes part and what travels: the two roles of a pair, every collective, and the world that user code sees.

Processes that ought to be equal are compared here. Knows nothing of the algorithm and of transformers.
"""

from .agreement import check_ranks_agree, check_repeatable, check_rest_alike, check_same_start
from .exchange import BUCKET_BYTES, Exchange, PeerLost, close_groups, partition, peers_expected, role_world
from .launcher import end_with_launcher
from .role_world import RANK_VARIABLES, SIZE_VARIABLES, Alone, RoleWorld, alone, groups_of_modules, whole_size_and_rank
from .roles import Mesh, Role
from .shards import Shards, class_of, here, is_spread, part_of, plain_name, shards_of, spread_as, units, whole


__all__ = [
    "BUCKET_BYTES",
    "RANK_VARIABLES",
    "SIZE_VARIABLES",
    "Alone",
    "Exchange",
    "Mesh",
    "PeerLost",
    "Role",
    "RoleWorld",
    "Shards",
    "alone",
    "check_ranks_agree",
    "check_repeatable",
    "check_rest_alike",
    "check_same_start",
    "class_of",
    "close_groups",
    "end_with_launcher",
    "groups_of_modules",
    "here",
    "is_spread",
    "part_of",
    "partition",
    "peers_expected",
    "plain_name",
    "role_world",
    "shards_of",
    "spread_as",
    "units",
    "whole",
    "whole_size_and_rank",
]
