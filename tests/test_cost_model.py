"""The cost model: bytes and seconds that were worked out by hand, its limits, and links found again from times that they make."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import inf, log2
from pathlib import Path

import cost_model
import pytest
from cost_model import (
    Group,
    Layout,
    Link,
    Machine,
    Network,
    Operation,
    Step,
    fit_link,
    operations,
    seconds_of_step,
    sent_per_node,
    sent_per_process,
)

from hf_sampa.distributed import exchange


# In numbers of one byte, so that bytes are units of d.
D = Step(weights=1, pass_seconds=3.0, number_bytes=1, sharded_bytes=1)
FREE = Network(Link(0, inf), Link(0, inf))
PAIR = Layout("sampa", 2, 2)


def on_one_node(method: str, devices: int, **fields) -> Layout:
    return Layout(method, devices, devices, **fields)


# ---- Bytes ----


@pytest.mark.parametrize(
    ("k", "whole", "shared", "adamw"),
    # whole: (k-1)/k + 1/k + 2 (k-1)/k. shared: twice (k-1)/k + 1/2k. AdamW on 2k processes: 2 (2k-1)/2k.
    [(1, 1, 1, 1), (2, 2, 1.5, 1.5), (4, 2.5, 1.75, 1.75), (8, 2.75, 1.875, 1.875)],
)
def test_bytes_that_a_process_sends(k, whole, shared, adamw):
    assert sent_per_process(D, on_one_node("sampa", 2 * k)) == pytest.approx(whole)
    assert sent_per_process(D, on_one_node("sampa", 2 * k, shared=True)) == pytest.approx(shared)
    assert sent_per_process(D, on_one_node("adamw", 2 * k)) == pytest.approx(adamw)
    assert sent_per_process(D, on_one_node("sam", 2 * k)) == pytest.approx(2 * adamw)


@pytest.mark.parametrize(
    ("method", "shards", "sent"),
    [
        ("adamw", 8, 3 * 7 / 8),  # two all-gathers and a reduce-scatter
        ("adamw", 4, 3 * 3 / 4 + 1 / 4),  # and an all-reduce of a quarter over two replicas
        ("sampa", 4, 3 * 3 / 4 + 1 / 4),  # and a quarter across the pair
        ("sampa", 2, 3 / 2 + 1 / 2 + 1 / 2),  # with two replicas in each role
        ("sam", 8, 2 * 3 * 7 / 8),
    ],
)
def test_bytes_under_fsdp(method, shards, sent):
    assert sent_per_process(D, on_one_node(method, 8, shards=shards)) == pytest.approx(sent)


@pytest.mark.parametrize("shards", [2, 4])
def test_bytes_under_fsdp_with_one_optimizer_for_a_pair(shards):
    """Half of a shard's gradients in backward; before the pass half of its updated weights, and half of its displaced ones."""
    shared = on_one_node("sampa", 8, shards=shards, shared=True)
    swaps = [(each.when, each.sent) for each in operations(D, shared) if each.kind == "swap"]
    assert swaps == [("backward", 1 / 2 / shards), ("before", 1 / 2 / shards), ("before", 1 / 2 / shards)]
    rest = sent_per_process(D, replace(shared, shared=False)) - 1 / shards
    assert sent_per_process(D, shared) == pytest.approx(rest + 1.5 / shards)


def test_bytes_of_numbers():
    step = Step(weights=10, pass_seconds=1.0)
    assert sent_per_process(step, PAIR) == 40
    assert sent_per_process(step, on_one_node("adamw", 2, shards=2)) == 3 * 20 / 2  # in 16 bits
    assert sent_per_process(step, on_one_node("sampa", 4, shards=2)) == 3 * 20 / 2 + 40 / 2  # across the pair in 32


@pytest.mark.parametrize(
    ("nodes", "apart", "within", "adamw"),
    [
        (2, 1, 3, 15 / 8),
        (4, 3 / 2 + 1 / 2, 3 * 2 * 3 / 4, 31 / 16),
        (16, 3 * 7 / 8 + 1 / 8, 3 * 2 * 15 / 16, 127 / 64),
    ],
)
def test_bytes_that_leave_a_node(nodes, apart, within, adamw):
    """Nodes of 8. Apart, a node has one role: 3 d in chains over the nodes of the role, and 8 d/k of swaps. Within, it has both."""
    layout = Layout("sampa", 8 * nodes, 8)
    assert sent_per_node(D, layout)[1] == pytest.approx(apart)
    assert sent_per_node(D, replace(layout, pairs_within=True))[1] == pytest.approx(within)
    assert sent_per_node(D, Layout("adamw", 8 * nodes, 8))[1] == pytest.approx(adamw)


@pytest.mark.parametrize(
    ("nodes", "shards"), [(n, s) for n in (2, 4, 16, 128) for s in (2, 4, 8, 16, 64) if s <= 4 * n]
)
@pytest.mark.parametrize("sharded_bytes", [2, 4])
def test_which_order_of_pairs_sends_less_under_fsdp(nodes, shards, sharded_bytes):
    """Nodes of 8; what the page says of shards and replicas, in bf16 and in fp32."""
    step = Step(weights=2**20, pass_seconds=1, sharded_bytes=sharded_bytes)
    layout = Layout("sampa", 8 * nodes, 8, shards=shards)
    apart, within = (sent_per_node(step, replace(layout, pairs_within=each))[1] for each in (False, True))
    replicas = layout.per_role // shards
    if shards >= 8:
        assert apart < within
    elif (replicas, sharded_bytes) == (2, 4):
        assert apart == within
    else:
        assert within < apart


def test_bytes_on_a_node_are_the_rest():
    for layout in (
        PAIR,
        Layout("sampa", 16, 8),
        Layout("sampa", 32, 8, shared=True),
        Layout("adamw", 16, 8, shards=8),
    ):
        within, across = sent_per_node(D, layout)
        assert within + across == pytest.approx(layout.per_node * sent_per_process(D, layout))
        assert (across > 0) == (layout.nodes > 1)
    # Shards on a node, replicas on two: eight all-reduces of d/8 leave each.
    assert sent_per_node(D, Layout("adamw", 16, 8, shards=8))[1] == pytest.approx(1)


# ---- Seconds ----


def test_without_waiting_a_step_is_its_passes():
    for layout in (
        PAIR,
        Layout("sampa", 64, 8),
        Layout("sampa", 64, 8, shared=True),
        Layout("adamw", 64, 8, shards=16),
    ):
        assert seconds_of_step(D, layout, FREE) == pytest.approx(3.0)
    assert seconds_of_step(D, Layout("sam", 64, 8), FREE) == pytest.approx(6.0)


@pytest.mark.parametrize(("method", "passes"), [("adamw", 1), ("sam", 2), ("sampa", 2)])
def test_one_device_sends_nothing(method, passes):
    layout = Layout(method, 1, 1)
    assert operations(D, layout) == [] and sent_per_node(D, layout) == (0, 0)
    assert seconds_of_step(D, layout, Network(Link(1, 1), Link(1, 1))) == pytest.approx(3.0 * passes)


def test_gradients_hide_behind_backward():
    """Of a pass of 3 s, backward has 2, of which gradients travel for 1.8."""
    for seconds, step in ((1.7, 3.0), (1.8, 3.0), (2.8, 4.0)):
        assert seconds_of_step(D, PAIR, Network(Link(0, 1 / seconds), FREE.across)) == pytest.approx(step)
    assert seconds_of_step(replace(D, overlap=0), PAIR, Network(Link(0, 1), FREE.across)) == pytest.approx(4.0)
    # Each of two passes has its own.
    slow = Network(Link(0, 1 / 2.8), FREE.across)
    assert seconds_of_step(D, on_one_node("sam", 2), slow) == pytest.approx(8.0)


def test_displaced_weights_are_waited_for():
    shared = replace(PAIR, shared=True)  # half of d across the pair
    assert seconds_of_step(D, shared, Network(Link(0, 1), FREE.across)) == pytest.approx(0.5 + 3.0)


def test_fsdp_gathers_behind_forward_and_backward():
    layout = on_one_node("adamw", 2, shards=2)  # half of d in forward, twice that in backward
    assert seconds_of_step(D, layout, Network(Link(0, 1 / 2), FREE.across)) == pytest.approx(1.0 + 0.2 + 2.0)
    assert seconds_of_step(D, layout, Network(Link(0, 1 / 4), FREE.across)) == pytest.approx(2.0 + 0.2 + 4.0)


def test_the_update_takes_time_by_the_numbers_that_it_touches():
    def update(layout: Layout) -> float:
        step = replace(D, memory_bandwidth=1.0)
        return seconds_of_step(step, layout, FREE) - seconds_of_step(D, layout, FREE)

    assert update(on_one_node("adamw", 2)) == pytest.approx(7)
    assert update(on_one_node("adamw", 2, shards=2)) == pytest.approx(3.5)
    assert update(on_one_node("sam", 2)) == pytest.approx(10)
    assert update(PAIR) == pytest.approx(15)
    assert update(replace(PAIR, shared=True)) == pytest.approx(7.5)
    assert update(on_one_node("sampa", 8, shards=2)) == pytest.approx(7.5)
    assert update(on_one_node("sampa", 8, shards=2, shared=True)) == pytest.approx(3.75)
    assert update(Layout("sampa", 1, 1)) == pytest.approx(18)


def test_what_leaves_a_node_shares_its_bandwidth():
    network = Network(Link(0, 100.0), Link(0, 1.0))
    swap = Operation("", "swap", 3.0, 1, Group(2, 2, 8), "backward")
    assert network.seconds(swap) == pytest.approx(24)
    assert network.seconds(replace(swap, group=Group(2, 1, 4))) == pytest.approx(0.03)
    # One ring leaves each of two nodes once; two of them take twice as long.
    ring = Operation("", "all_reduce", 16.0, 1, Group(16, 2, 1), "backward")
    assert network.seconds(ring) == pytest.approx(30)
    assert network.seconds(replace(ring, group=Group(8, 2, 2))) == pytest.approx(2 * 28)


def test_latency_counts_hops_and_messages():
    network = Network(Link(1.0, inf), Link(100.0, inf))
    chain = Operation("", "broadcast", 1.0, 1, Group(8, 1, 1), "backward")
    assert network.seconds(chain) == 7
    assert network.seconds(replace(chain, messages=5)) == 35
    assert network.seconds(replace(chain, group=Group(64, 8, 1))) == 7 + 100 * log2(8)
    assert network.seconds(replace(chain, kind="all_reduce")) == 14
    assert network.seconds(replace(chain, kind="swap", group=Group(2, 2, 8))) == 100
    assert [each.messages for each in operations(Step(weights=2 * 2**20, pass_seconds=1), PAIR)] == [2]
    assert cost_model.SAMPA_BUCKET == exchange.BUCKET_BYTES


def test_on_one_machine_processes_take_turns():
    machine = Machine({"swap": Link(1.0, 2.0)}, cores=2)
    swap = Operation("", "swap", 4.0, 3, Group(2, 1, 1), "backward")
    assert machine.seconds(swap) == 3 * 1.0 + 2.0
    assert machine.seconds(replace(swap, group=Group(2, 1, 4))) == 4 * 5.0


# ---- The fit ----


@pytest.mark.parametrize("kind", ["swap", "reduce", "broadcast", "all_gather", "all_reduce"])
def test_the_fit_finds_the_link_that_made_the_times(kind):
    machine = Machine({kind: Link(3e-4, 1.5e9)}, cores=8)
    moved = [
        Operation("", kind, size, 1, Group(2, 1, n // 2) if kind == "swap" else Group(n, 1, 1), "")
        for n in (2, 4, 8)
        for size in (2**12, 2**18, 2**24)
    ]
    found = fit_link([(each.hops[0], each.through_a_link, machine.seconds(each)) for each in moved])
    assert (found.latency, found.bandwidth) == (pytest.approx(3e-4), pytest.approx(1.5e9))


def test_the_fit_weighs_relative_errors():
    # 10 % more and 10 % less at each size: the middle, whatever the size.
    points = [(1, size, factor * (1e-3 + size / 1e6)) for size in (1, 10**3, 10**6) for factor in (0.9, 1 / 0.9)]
    found = fit_link(points)
    assert (found.latency, found.bandwidth) == (pytest.approx(1e-3, rel=0.02), pytest.approx(1e6, rel=0.02))


def test_no_figure_of_a_fit_is_negative():
    assert fit_link([(1, 1, 0.5), (1, 2, 2.0), (1, 4, 8.0)]).latency == 0
    assert fit_link([(1, 1, 3.0), (1, 2, 2.0), (1, 4, 1.0)]).bandwidth == inf


def test_one_size_is_not_enough():
    with pytest.raises(
        ValueError, match="expected points of several sizes, .* got 2 that cannot. Measure at least two"
    ):
        fit_link([(1, 100, 0.5), (1, 100, 0.6)])


# ---- Layouts ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "sgd"}, "method: expected adamw, sam or sampa, got 'sgd'"),
        ({"per_node": 3}, "devices: expected whole nodes of 3, got 8"),
        ({"devices": 3, "per_node": 3}, "expected halves for the two roles, got 1 nodes of 3. Take an even number of devices on"),
        ({"devices": 24}, "expected halves for the two roles, got 3 nodes of 8. Take an even number of nodes, or pairs_within"),
        ({"shards": 3}, "shards: expected a divisor of the 4 processes of a role"),
        ({"method": "sam", "shared": True}, "shared: the model knows it for sampa on several devices only"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{"method": "sampa", "devices": 8, "per_node": 8, **fields})


def test_it_needs_no_torch():
    code = "import sys, cost_model; sys.exit('torch' in sys.modules)"
    folder = Path(cost_model.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=60).returncode == 0
