"""What a step costs on many devices: seconds and bytes, from the latency and bandwidth of the links, the size of the model and the layout.

A model on paper: nothing here computes, sends or measures anything. d trained weights; n processes, of which k have the same role
(see `docs/several_devices.md`); s shards. `docs/scaling.md` says what it assumes, beside what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, inf, log2
from typing import Protocol


# Of torch's DistributedDataParallel, and of hf_sampa/distributed/exchange.py.
DDP_BUCKET, SAMPA_BUCKET = 25 * 2**20, 4 * 2**20

# How often each weight's numbers are read or written outside of the passes. AdamW reads weight, gradient and two moments, and writes all but
# the gradient; the perturbation reads two and writes one; the look-ahead reads four and writes one; the mix reads two and writes one.
ADAMW, PERTURB, LOOK_AHEAD, MIX = 7, 3, 5, 3


@dataclass(frozen=True)
class Link:
    """Between two devices, in one direction.

    Attributes:
        latency: seconds until the first byte of a message has arrived.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Group:
    """Processes that take part in one collective; as many on each of their nodes.

    Attributes:
        size: how many they are.
        nodes: how many nodes they are spread over.
        beside: groups of this kind that are at work on each node at the same time.
    """

    size: int
    nodes: int
    beside: int

    @property
    def per_node(self) -> int:
        """Processes at work on a node, in all groups."""
        return self.size // self.nodes * self.beside


@dataclass(frozen=True)
class Operation:
    """One kind of transfer of a pass, or of a step.

    Attributes:
        name: what travels.
        kind: "swap" (each of two sends the other `size`), "reduce" or "broadcast" (to or from one process, each in its turn),
            "reduce_scatter", "all_gather" or "all_reduce".
        size: bytes of the whole, in all messages together.
        messages: how many it comes in.
        group: who takes part.
        when: "before" a pass, or during its "forward" or "backward".
    """

    name: str
    kind: str
    size: float
    messages: int
    group: Group
    when: str

    @property
    def hops(self) -> tuple[float, float]:
        """Latencies that a message waits for, within a node and across nodes: a chain within, a tree across, as NCCL counts for its trees
        (`src/graph/tuning.cc`)."""
        if self.kind == "swap":
            return (1, 0) if self.group.nodes == 1 else (0, 1)
        ways = 2 if self.kind == "all_reduce" else 1
        return ways * (self.group.size // self.group.nodes - 1), ways * ceil(log2(self.group.nodes))

    @property
    def through_a_link(self) -> float:
        """Bytes through the busiest link: the bus bandwidth's factors of nccl-tests (`doc/PERFORMANCE.md`)."""
        return self.size * (1 if self.kind in ("swap", "reduce", "broadcast") else self._around(self.group.size))

    @property
    def sent(self) -> float:
        """Bytes that a process sends; where one after the other is root, the mean."""
        return self.size * (1 if self.kind == "swap" else self._around(self.group.size))

    @property
    def across(self) -> float:
        """Bytes that leave a node, of all its groups together.

        A ring over ranks that are sorted by node leaves each node once, with as many bytes as any of its processes sends. A chain from or to
        one process leaves all nodes but one.
        """
        size, nodes, beside = self.group.size, self.group.nodes, self.group.beside
        if nodes == 1:
            return 0
        if self.kind == "swap":
            return beside * self.size
        return beside * self.size * self._around(nodes if self.kind in ("reduce", "broadcast") else size)

    def _around(self, members: int) -> float:
        """Of a message's bytes, those that each of a ring's members passes on."""
        return (2 if self.kind == "all_reduce" else 1) * (members - 1) / members


class Wires(Protocol):
    """What says how long an operation takes."""

    def seconds(self, operation: Operation) -> float: ...


@dataclass(frozen=True)
class Network:
    """Nodes of several devices.

    Attributes:
        within: between devices of a node; the bandwidth is a device's.
        across: between nodes; the bandwidth is a node's, and all that leave it at the same time share it.
    """

    within: Link
    across: Link

    def seconds(self, operation: Operation) -> float:
        """All its messages, one after the other."""
        within, across = operation.hops
        waiting = operation.messages * (within * self.within.latency + across * self.across.latency)
        bandwidth = self.within.bandwidth
        if operation.group.nodes > 1:
            bandwidth = min(bandwidth, self.across.bandwidth / operation.group.beside)
        return waiting + operation.through_a_link / bandwidth


@dataclass(frozen=True)
class Machine:
    """One machine, whose cores do both: compute and move. More processes than cores take turns.

    Attributes:
        links: of each kind of operation, with a core for each process.
        cores: how many there are.
    """

    links: Mapping[str, Link]
    cores: int

    def turns(self, processes: int) -> float:
        """By how much `processes` at work are slower than one with a core of its own."""
        return max(1, processes / self.cores)

    def seconds(self, operation: Operation) -> float:
        link = self.links[operation.kind]
        alone = operation.messages * operation.hops[0] * link.latency + operation.through_a_link / link.bandwidth
        return self.turns(operation.group.per_node) * alone


def fit_link(points: Iterable[tuple[float, float, float]]) -> Link:
    """The link that explains measured times with the smallest sum of squared relative errors.

    Args:
        points: latencies, bytes and seconds of each; seconds are their sum, latencies * latency + bytes / bandwidth.

    Raises:
        ValueError: they do not tell latency from bandwidth.
    """
    rows = [(hops / seconds, size / seconds) for hops, size, seconds in points]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-9 * aa * bb:
        raise ValueError(
            f"expected points of several sizes, by which latency and bandwidth can be told apart, got {len(rows)} that cannot. "
            "Measure at least two sizes"
        )
    latency, per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    # Neither can be negative: then the other one alone explains the times best.
    if latency < 0:
        latency, per_byte = 0.0, b / bb
    elif per_byte <= 0:
        latency, per_byte = a / aa, 0.0
    return Link(latency, 1 / per_byte if per_byte else inf)


@dataclass(frozen=True)
class Step:
    """What a process does between two updates, on a device of its own.

    Attributes:
        weights: d, of which each is trained.
        pass_seconds: of one forward and backward pass.
        number_bytes: of a gradient and of a weight, where they travel whole.
        sharded_bytes: of what FSDP2 gathers and reduces.
        units: parts that FSDP2 gathers one at a time.
        bucket: bytes of this package's messages, at most; torch's data parallel has its own.
        backward: which part of a pass is backward.
        overlap: which part of backward is under way while gradients travel.
        memory_bandwidth: bytes that a device reads or writes per second.
    """

    weights: int
    pass_seconds: float
    number_bytes: int = 4
    sharded_bytes: int = 2
    units: int = 1
    bucket: int = SAMPA_BUCKET
    backward: float = 2 / 3
    overlap: float = 0.9
    memory_bandwidth: float = inf

    @property
    def size(self) -> int:
        """Bytes of a gradient."""
        return self.weights * self.number_bytes


@dataclass(frozen=True)
class Layout:
    """One process per device.

    Attributes:
        method: "adamw" (data parallel), "sam" (data parallel, two passes one after the other) or "sampa".
        devices: n.
        per_node: how many of them are on one node.
        shards: s, over how many processes FSDP2 spreads a role's weights; 1: they are whole.
        shared: whether all processes, or the two of each pair where weights are in shards, share one optimizer (`shard_optimizer`).
        pairs_within: whether the two processes of a pair are on one node, where there are several; else each role has nodes of its own.

    Raises:
        ValueError: the numbers do not go together.
    """

    method: str
    devices: int
    per_node: int
    shards: int = 1
    shared: bool = False
    pairs_within: bool = False

    def __post_init__(self):
        if self.method not in ("adamw", "sam", "sampa"):
            raise ValueError(f"method: expected adamw, sam or sampa, got {self.method!r}")
        if self.devices % self.per_node:
            raise ValueError(f"devices: expected whole nodes of {self.per_node}, got {self.devices}")
        if self.paired and (self.per_node if self._share_nodes else self.nodes) % 2:
            raise ValueError(
                f"devices: expected halves for the two roles, got {self.nodes} nodes of {self.per_node}. Take an even number of "
                f"{'devices on a node' if self._share_nodes else 'nodes, or pairs_within=True'}"
            )
        on_a_node = self.per_node // self.roles_per_node
        if self.per_role % self.shards or (on_a_node % self.shards and self.shards % on_a_node):
            raise ValueError(
                f"shards: expected a divisor of the {self.per_role} processes of a role, on whole nodes or on a part of one, got {self.shards}"
            )
        if self.shared and not self.paired:
            raise ValueError("shared: the model knows it for sampa on several devices only")

    @property
    def paired(self) -> bool:
        return self.method == "sampa" and self.devices > 1

    @property
    def per_role(self) -> int:
        """k, processes with the same weights or a part of them, which share an update batch."""
        return self.devices // 2 if self.paired else self.devices

    @property
    def nodes(self) -> int:
        return self.devices // self.per_node

    @property
    def _share_nodes(self) -> bool:
        return self.nodes == 1 or self.pairs_within

    @property
    def roles_per_node(self) -> int:
        return 2 if self.paired and self._share_nodes else 1

    @property
    def passes(self) -> int:
        """One after the other."""
        return 2 if self.method == "sam" or (self.method == "sampa" and not self.paired) else 1

    @property
    def world(self) -> Group:
        return Group(self.devices, self.nodes, 1)

    @property
    def role(self) -> Group:
        return Group(self.per_role, self.nodes * self.roles_per_node // (1 + self.paired), self.roles_per_node)

    @property
    def pair(self) -> Group:
        within = self.roles_per_node == 2
        return Group(2, 1 if within else 2, self.per_node // self.roles_per_node)

    @property
    def shard_group(self) -> Group:
        """Processes that hold one copy of the weights together."""
        on_a_node = self.per_node // self.roles_per_node
        return Group(
            self.shards, max(1, self.shards // on_a_node), self.roles_per_node * max(1, on_a_node // self.shards)
        )

    @property
    def replica_group(self) -> Group:
        """Processes of a role that hold the same shard."""
        on_a_node = self.per_node // self.roles_per_node
        nodes = self.role.nodes // self.shard_group.nodes
        return Group(self.per_role // self.shards, nodes, self.roles_per_node * min(on_a_node, self.shards))


def operations(step: Step, layout: Layout) -> list[Operation]:
    """What travels in one pass and the update after it. Of sequential SAM each of the two passes has the same."""
    if layout.shards > 1:
        found = _of_shards(step, layout)
    elif layout.shared:
        found = _of_shared_optimizer(step, layout)
    elif layout.paired:
        found = _of_pairs(step, layout)
    else:
        bucket = DDP_BUCKET if layout.method == "adamw" else step.bucket
        found = [_in_buckets("gradients", "all_reduce", step.size, layout.role, "backward", bucket)]
    return [operation for operation in found if operation.group.size > 1]


def _in_buckets(name: str, kind: str, size: float, group: Group, when: str, bucket: int) -> Operation:
    return Operation(name, kind, size, ceil(size / bucket), group, when)


def _of_pairs(step: Step, layout: Layout) -> Iterator[Operation]:
    """Each bucket is added up in one process of a role, which swaps it with the other half of its pair and gives both to its role."""
    k, d, bucket = layout.per_role, step.size, step.bucket
    yield _in_buckets("own gradient", "reduce", d, layout.role, "backward", bucket)
    yield _in_buckets("gradients across pairs", "swap", d / k, layout.pair, "backward", bucket)
    yield _in_buckets("both gradients", "broadcast", 2 * d, layout.role, "backward", bucket)


def _of_shared_optimizer(step: Step, layout: Layout) -> Iterator[Operation]:
    """Each pair updates d/k of the weights, each of its two processes half of that; the others are given these displaced."""
    own, d, bucket = step.size / layout.devices, step.size, step.bucket
    yield _in_buckets("displaced weights across pairs", "swap", own, layout.pair, "before", bucket)
    yield _in_buckets("displaced weights", "broadcast", d, layout.role, "before", bucket)
    yield _in_buckets("own gradient", "reduce", d, layout.role, "backward", bucket)
    yield _in_buckets("gradients across pairs", "swap", own, layout.pair, "backward", bucket)


def _of_shards(step: Step, layout: Layout) -> Iterator[Operation]:
    """FSDP2's own, then what its shards are to the other role."""
    whole, shards, replicas = step.weights * step.sharded_bytes, layout.shard_group, layout.replica_group
    yield Operation("weights", "all_gather", whole, step.units, shards, "forward")
    yield Operation("weights again", "all_gather", whole, step.units, shards, "backward")
    yield Operation("gradients", "reduce_scatter", whole, step.units, shards, "backward")
    yield Operation("gradients of replicas", "all_reduce", whole / layout.shards, step.units, replicas, "backward")
    if layout.paired:
        # With one optimizer for both, each gives what the other one does not update.
        size = step.size / layout.shards / (2 if layout.shared else 1)
        yield _in_buckets("gradients across pairs", "swap", size, layout.pair, "backward", step.bucket)
        for name in ("updated weights", "displaced weights") if layout.shared else ():
            yield _in_buckets(f"{name} across pairs", "swap", size, layout.pair, "before", step.bucket)


def seconds_of_step(step: Step, layout: Layout, wires: Wires) -> float:
    """From one update to the next.

    Transfers of a kind follow one another. What travels during forward or backward costs what it takes longer than they do; before a pass
    nothing else is under way.
    """
    travels = dict.fromkeys(("before", "forward", "backward"), 0.0)
    for operation in operations(step, layout):
        travels[operation.when] += wires.seconds(operation)
    backward = step.backward * step.pass_seconds
    hides = step.overlap * backward
    one_pass = (
        travels["before"]
        + max(step.pass_seconds - backward, travels["forward"])
        + backward
        - hides
        + max(hides, travels["backward"])
    )
    return layout.passes * one_pass + _around_passes(step, layout)


def _around_passes(step: Step, layout: Layout) -> float:
    """Seconds of what grows with the weights alone: displacing, mixing, updating."""
    numbers = ADAMW
    if layout.method == "sam":
        numbers += PERTURB
    if layout.method == "sampa":
        # Of a pair, one process perturbs while the other one looks ahead, which takes longer.
        numbers += LOOK_AHEAD + MIX + (0 if layout.paired else PERTURB)
    owners = (2 if layout.shards > 1 else layout.devices) if layout.shared else 1
    return numbers * step.size / (layout.shards * owners) / step.memory_bandwidth


def sent_per_process(step: Step, layout: Layout) -> float:
    """Bytes per step; a mean over processes."""
    return layout.passes * sum(operation.sent for operation in operations(step, layout))


def sent_per_node(step: Step, layout: Layout) -> tuple[float, float]:
    """Bytes per step that a node's processes send to one another, and to other nodes."""
    across = layout.passes * sum(operation.across for operation in operations(step, layout))
    return layout.per_node * sent_per_process(step, layout) - across, across
