"""How a planned run is started: a command for every node, and the training arguments that make it what was planned."""

from __future__ import annotations

from typing import Any

from ..compat import checkpointing_argument
from ..launch import configurations
from .layouts import Layout
from .memory import Run


ELASTIC = "--rdzv_backend c10d --rdzv_endpoint HOST:29500 --rdzv_id my_run"


def command(layout: Layout) -> str:
    """What starts its processes. HOST is the address of one of several nodes, on each of which it is to be run."""
    config = "one_process" if layout.devices == 1 else f"gpu_{layout.devices}"
    if layout.nodes == 1 and config in configurations():
        return f"python -m hf_sampa launch --config {config} script.py"
    nodes = "--standalone" if layout.nodes == 1 else f"--nnodes {layout.nodes} {ELASTIC}"
    return f"torchrun {nodes} --nproc_per_node {layout.per_node} script.py"


def arguments(run: Run, layout: Layout) -> dict[str, Any]:
    """Training arguments that differ from their defaults; `parallelism_config` as what its class is given."""
    found: dict[str, Any] = {"per_device_train_batch_size": run.batch}
    if layout.method == "sam":
        found["method"] = "sam"
    if run.optimizer != "adamw":
        found["optim"] = "sgd"
    if run.optimizer == "sgd_momentum":
        found["optim_args"] = "momentum=0.9"
    if run.bf16:
        found["bf16"] = True
    if run.checkpointing:
        # Under FSDP2, too, where transformers recommends fsdp_config's: that draws dropout anew, and gathers no less.
        found[checkpointing_argument()] = True
    if layout.shared:
        found["shard_optimizer"] = True
    if layout.pairs_on_one_node:
        found["pairs_on_one_node"] = True
    if layout.shards > 1:
        found |= {"fsdp": True, "fsdp_config": {"version": 2}}
        # SAMPaTrainer does so itself.
        if layout.method == "adamw" and run.size.layers is not None:
            found["fsdp_config"]["transformer_layer_cls_to_wrap"] = run.size.layers
        if layout.replicas > 1:
            found["parallelism_config"] = {"dp_replicate_size": layout.replicas, "dp_shard_size": layout.shards}
    return found


def as_code(found: dict[str, Any], layout: Layout) -> list[str]:
    """Lines of Python with these arguments."""
    name = "TrainingArguments" if layout.method == "adamw" else "SAMPaTrainingArguments"
    lines = ["from accelerate import ParallelismConfig"] if "parallelism_config" in found else []
    lines += [f"args = {name}(", '    "out",']
    for key, value in found.items():
        if key == "parallelism_config":
            shown = f"ParallelismConfig({', '.join(f'{each}={number}' for each, number in value.items())})"
        else:
            shown = repr(value).replace("'", '"')
        lines.append(f"    {key}={shown},")
    return [*lines, ")"]
