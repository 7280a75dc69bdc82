"""Who does what: the (role, replica) mesh of a run, and the worlds that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    """Half of a SAMPa step. The value is the row of the mesh."""

    PERTURBED = 0  # holds x~_t and B_t, computes g~_t
    LOOKAHEAD = 1  # holds y_{t+1} and B_{t+1}, computes g_{t+1}


@dataclass(frozen=True)
class Mesh:
    """One process's place among `world_size` processes.

    With two roles, ranks 0..k-1 are PERTURBED and ranks k..2k-1 LOOKAHEAD, and rank r and rank r + k are a pair; or `neighbours`
    are, ranks 2r and 2r + 1. A pair reads the same share of every batch. With one role (sequential SAM, or one process), all ranks
    are replicas.

    Args:
        world_size: number of processes, >= 1.
        rank: this process, in [0, world_size).
        paired: whether the two roles are spread over the processes.
        neighbours: whether the ranks of a pair follow one another.
    """

    world_size: int
    rank: int
    paired: bool
    neighbours: bool = False

    @classmethod
    def for_method(cls, method: str, world_size: int, rank: int, neighbours: bool = False) -> Mesh:
        """Place of `rank` under `method` ("sampa" or "sam"). Raises ValueError for an odd world above one."""
        if method == "sampa" and world_size > 1 and world_size % 2:
            raise ValueError(
                f"SAMPa pairs processes, so it needs an even number of them (or one), but the world has {world_size}. "
                f"Start it with `accelerate launch --num_processes {world_size + 1}` or `torchrun --nproc_per_node "
                f"{world_size + 1}`, or use method='sam', which takes any number."
            )
        paired = method == "sampa" and world_size > 1
        return cls(world_size, rank, paired, neighbours=paired and neighbours)

    @property
    def num_replicas(self) -> int:
        """Processes that share one update batch."""
        return self.world_size // 2 if self.paired else self.world_size

    @property
    def replica(self) -> int:
        """Which share of an update batch this process reads, in [0, num_replicas)."""
        return self.replica_of(self.rank)

    def replica_of(self, rank: int) -> int:
        """As `replica`, of any rank."""
        return rank // 2 if self.neighbours else rank % self.num_replicas

    def first_with(self, rank: int, shards: int) -> int:
        """The first rank that holds the same one of `shards` as `rank`; those of a replica of the model are next to one another."""
        return self.ranks_of(Role.PERTURBED)[self.replica_of(rank) % shards]

    def alike(self, shards: int) -> list[int]:
        """Ranks that hold the same one of `shards` as this one."""
        own = self.first_with(self.rank, shards)
        return [rank for rank in range(self.world_size) if self.first_with(rank, shards) == own]

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that this process plays, in the order in which it plays them."""
        if not self.paired:
            return (Role.PERTURBED, Role.LOOKAHEAD)
        return (Role(self.rank % 2 if self.neighbours else self.rank // self.num_replicas),)

    @property
    def peer(self) -> int:
        """Rank of the other half of this pair. Only for paired meshes."""
        assert self.paired
        return self.ranks_of(Role(1 - self.roles[0]))[self.replica]

    def ranks_of(self, role: Role) -> list[int]:
        """Ranks that play `role`, by replica."""
        if self.neighbours:
            return list(range(role, self.world_size, 2))
        start = self.num_replicas * role if self.paired else 0
        return list(range(start, start + self.num_replicas))
