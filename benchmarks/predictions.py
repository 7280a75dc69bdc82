"""What the cost model is told for its predictions: devices, links and three models; and the layouts that they are trained in.

Nothing here is measured, but for one figure on an H100. `scaling_page.py` has the tables that follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from cost_model import Layout, Link, Network, Step, seconds_of_step
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_sampa.plan.layouts import Layout as Planned
from hf_sampa.plan.layouts import layouts as planned_layouts
from hf_sampa.plan.memory import GB, Run, memory
from hf_sampa.plan.model_size import ModelSize, size_of
from hf_sampa.plan.report import usable


# ---- Assumptions ----

ACHIEVED = 0.8  # of every bandwidth
FLOPS = 989e12  # of an H100 SXM per second, bf16, dense matrices
HBM = 3.35e12  # bytes per second
NVLINK = 450e9  # bytes per second and direction, of a device
ETHERNET, INFINIBAND = 100e9 / 8, 8 * 400e9 / 8  # bytes per second and direction, of a node
DEVICE_MEMORY = 80 * GB
PER_NODE = 8
# Seconds; NCCL's own tables, by which it chooses between its algorithms, have figures of this order.
LATENCY = {"NVLink": 5e-6, "InfiniBand": 10e-6, "Ethernet": 30e-6}


def _network(across: str, bandwidth: float) -> Network:
    return Network(Link(LATENCY["NVLink"], ACHIEVED * NVLINK), Link(LATENCY[across], ACHIEVED * bandwidth))


NETWORKS = {"InfiniBand": _network("InfiniBand", INFINIBAND), "Ethernet": _network("Ethernet", ETHERNET)}


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        size: of the model.
        batch: samples per device and pass.
        tokens: per sample.
        efficiency: which part of the device's FLOP/s a pass reaches.
    """

    size: ModelSize
    batch: int
    tokens: int
    efficiency: float

    @property
    def run(self) -> Run:
        return Run(
            size=self.size,
            trained=self.size.weights,
            optimizer="adamw",
            batch=self.batch,
            tokens=self.tokens,
            bf16=True,
            checkpointing=False,
            frozen_bytes=4,
        )

    @property
    def step(self) -> Step:
        # Of each weight and token, two operations forward and four backward.
        flops = 6 * self.size.weights * self.batch * self.tokens
        return Step(
            weights=self.size.weights,
            pass_seconds=flops / (self.efficiency * FLOPS),
            units=len(self.size.units) + 1,
            memory_bandwidth=ACHIEVED * HBM,
        )


@cache
def models() -> dict[str, Model]:
    """By name; on no device, without numbers."""
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        bert = size_of(BertForSequenceClassification(BertConfig()), "BERT-base")
        one = size_of(LlamaForCausalLM(llama), "1 B")
        seven = size_of(LlamaForCausalLM(LlamaConfig()), "7 B")
    return {
        # 26 ms were measured for AdamW's step on an H100 (docs/cost.md).
        "BERT-base": Model(bert, batch=32, tokens=128, efficiency=0.1),
        "1 B": Model(one, batch=4, tokens=2048, efficiency=0.4),
        "7 B": Model(seven, batch=2, tokens=2048, efficiency=0.4),
    }


# ---- Layouts ----


@dataclass(frozen=True)
class Column:
    """A method, and how it is spread.

    Attributes:
        method: as of a `Layout`.
        sharded: whether FSDP2 spreads the weights.
        shared: as of a `Layout`.
    """

    method: str
    sharded: bool = False
    shared: bool = False


COLUMNS = {
    "AdamW, DDP": Column("adamw"),
    "AdamW, FSDP2": Column("adamw", sharded=True),
    "SAM": Column("sam"),
    "SAM, FSDP2": Column("sam", sharded=True),
    "SAMPa": Column("sampa"),
    "SAMPa, `shard_optimizer`": Column("sampa", shared=True),
    "SAMPa, FSDP2": Column("sampa", sharded=True),
    "SAMPa, FSDP2, `shard_optimizer`": Column("sampa", sharded=True, shared=True),
}


@dataclass(frozen=True)
class Predicted:
    """Seconds of a step in a layout."""

    seconds: float
    layout: Layout


def fitting(model: Model, name: str, devices: int, per_node: int) -> Iterator[Layout]:
    """All layouts of a column that a device has memory for: every number of shards, the smallest first, in every order of pairs."""
    column = COLUMNS[name]
    for planned in planned_layouts(column.method, devices, per_node, state=True):
        wanted = Column(planned.method, planned.shards > 1, planned.shared) == column
        if wanted and memory(model.run, planned).total <= usable(DEVICE_MEMORY):
            yield from orders(planned)


def orders(planned: Planned) -> list[Layout]:
    """Roles on nodes of their own, unless one node would have both; then, of several nodes, pairs within a node."""
    fields = (planned.method, planned.devices, planned.per_node, planned.shards, planned.shared)
    several = planned.paired and planned.nodes > 1
    apart = [] if several and planned.nodes % 2 else [Layout(*fields)]
    within = [Layout(*fields, pairs_within=True)] if several and planned.per_node % 2 == 0 else []
    return apart + within


def fastest_of_column(model: Model, name: str, devices: int, per_node: int, network: str) -> Predicted | None:
    """Over one of `NETWORKS`; of equally fast ones the first. None where nothing fits."""
    return _fastest(
        Predicted(seconds_of_step(model.step, layout, NETWORKS[network]), layout)
        for layout in fitting(model, name, devices, per_node)
    )


def fastest(model: Model, method: str, *where) -> Predicted | None:
    """Of all columns of a method; `where` is as of `fastest_of_column`."""
    found = (fastest_of_column(model, name, *where) for name, column in COLUMNS.items() if column.method == method)
    return _fastest(each for each in found if each)


def _fastest(found: Iterable[Predicted]) -> Predicted | None:
    return min(found, key=lambda each: each.seconds, default=None)
