"""What the cost model is told for its predictions: devices, links and three models; and the layouts that they are trained in.

Nothing here is measured, but for one figure on an H100. `scaling_page.py` has the tables that follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from cost_model import Layout, Link, Network, Step, better_order, seconds_of_step
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
    """A method, and how it may be spread.

    Attributes:
        method: as of a `Layout`.
        least: shards, at least.
        most: shards, at most; None: as many as it takes.
        shared: as of a `Layout`.
    """

    method: str
    least: int = 1
    most: int | None = None
    shared: bool = False


COLUMNS = {
    "AdamW, DDP": Column("adamw", most=1),
    "AdamW, FSDP2": Column("adamw", least=2),
    "SAM": Column("sam", most=1),
    "SAM, FSDP2": Column("sam", least=2),
    "SAMPa": Column("sampa", most=1),
    "SAMPa, `shard_optimizer`": Column("sampa", most=1, shared=True),
    "SAMPa, FSDP2": Column("sampa", least=2),
}


def layout_of(model: Model, name: str, devices: int, per_node: int) -> Layout | None:
    """The one with the fewest shards that fit a device, in the order that sends less across nodes; None where nothing fits."""
    column = COLUMNS[name]
    for planned in planned_layouts(column.method, devices, per_node, state=True):
        wanted = column.least <= planned.shards <= (column.most or devices) and planned.shared == column.shared
        if wanted and memory(model.run, planned).total <= usable(DEVICE_MEMORY):
            return better_order(model.step, orders(planned))
    return None


def orders(planned: Planned) -> list[Layout]:
    """Roles on nodes of their own, then, where there is another order, pairs within a node."""
    fields = (planned.method, planned.devices, planned.per_node, planned.shards, planned.shared)
    apart = Layout(*fields)
    two = apart.paired and apart.nodes > 1 and apart.per_node > 1
    return [apart, replace(apart, pairs_within=True)] if two else [apart]


def seconds(model: Model, name: str, devices: int, per_node: int, network: str) -> float | None:
    """Of a step in that layout, over one of `NETWORKS`; None where nothing fits."""
    layout = layout_of(model, name, devices, per_node)
    return seconds_of_step(model.step, layout, NETWORKS[network]) if layout else None


def fastest(model: Model, method: str, *where) -> float | None:
    """Of all layouts of a method; `where` is as of `seconds`."""
    found = [seconds(model, name, *where) for name, column in COLUMNS.items() if column.method == method]
    return min((each for each in found if each), default=None)
