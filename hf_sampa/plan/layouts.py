"""Ways to spread a run over devices, and the first of them that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One process per device.

    Attributes:
        method: "sampa", "sam", or "adamw" for plain Trainer.
        devices: how many there are.
        per_node: how many of them are on one node.
        shards: S, over how many processes FSDP2 spreads a role's weights; 1: they are whole.
        shared: whether `shard_optimizer` is on.
    """

    method: str
    devices: int
    per_node: int
    shards: int = 1
    shared: bool = False

    @property
    def paired(self) -> bool:
        return self.method == "sampa" and self.devices > 1

    @property
    def per_role(self) -> int:
        """Processes that share an update batch, k."""
        return self.devices // 2 if self.paired else self.devices

    @property
    def replicas(self) -> int:
        """Copies of the weights in a role."""
        return self.per_role // self.shards

    @property
    def nodes(self) -> int:
        return self.devices // self.per_node

    @property
    def pairs_on_one_node(self) -> bool:
        """Whether to make that setting, with which less leaves a node, as `benchmarks/cost_model.py` counts: under FSDP2, where a node has room
        for a replica of each role. Averages of both roles cross nodes then, and what pairs swap does not."""
        return self.paired and self.nodes > 1 and self.shards > 1 and self.per_node % (2 * self.shards) == 0

    @property
    def sharing(self) -> int:
        """Processes over which the optimizer's state is spread, beside shards."""
        if not self.shared:
            return 1
        return 2 if self.shards > 1 else self.devices


def layouts(method: str, devices: int, per_node: int, *, state: bool) -> Iterator[Layout]:
    """All of them, with what is sent least first: whole weights, one optimizer for a pair, then as few shards as possible.

    Args:
        method: as of a `Layout`.
        devices: even or one for "sampa", and a multiple of `per_node`.
        per_node: devices on one node. Shards are on one, or on whole ones.
        state: whether the optimizer keeps anything that could be shared.
    """
    per_role = Layout(method, devices, per_node).per_role
    for shards in range(1, per_role + 1):
        if per_role % shards == 0 and (per_node % shards == 0 or shards % per_node == 0):
            yield Layout(method, devices, per_node, shards)
            # Beside FSDP2, sequential SAM has no optimizer to share.
            if state and devices > 1 and (method == "sampa" or method == "sam" and shards == 1):
                yield Layout(method, devices, per_node, shards, shared=True)


def first_that_fits(found: Iterator[Layout], total: Callable[[Layout], int], usable: float) -> tuple[Layout, bool]:
    """The first whose `total` of bytes is at most `usable`, and True; or the smallest, and False."""
    tried = []
    for layout in found:
        if total(layout) <= usable:
            return layout, True
        tried.append(layout)
    return min(tried, key=total), False
