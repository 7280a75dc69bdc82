"""FSDP2 on gloo: accelerate turns it on for devices like GPUs only, so that it is told that these processes have them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from hf_sampa import SAMPaTrainer, compat
from hf_sampa.distributed import plain_name, whole
from tests import tiny


needs_versions = pytest.mark.skipif(
    any(compat.before(*each) for each in compat.SHARDS.items()), reason="FSDP2 has a floor of its own"
)
DEFAULTS = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}
FSDP = {"fsdp": True, "fsdp_config": {**DEFAULTS, "transformer_layer_cls_to_wrap": ["BertLayer"]}}


class AsOnGPU:
    """Shards as it would on GPUs."""

    def create_accelerator_and_postprocess(self):
        state = PartialState()
        before, state.distributed_type = state.distributed_type, DistributedType.MULTI_GPU
        try:
            super().create_accelerator_and_postprocess()
        finally:
            state.distributed_type = before


class OnCPU(AsOnGPU, SAMPaTrainer): ...


class PlainOnCPU(AsOnGPU, Trainer): ...


def trainer(folder, model, dataset, changes: dict[str, Any], kind: str = "sampa", **kwargs) -> Trainer:
    """One that shards where `changes` say fsdp; plain Trainer where `kind` is "adamw"."""
    args = tiny.arguments(folder, **changes)
    if kind == "adamw":
        args = TrainingArguments(
            **{each.name: getattr(args, each.name) for each in fields(TrainingArguments) if each.init}
        )
        return PlainOnCPU(model=model(), args=args, train_dataset=dataset, **kwargs)
    return (OnCPU if args.fsdp else SAMPaTrainer)(model=model(), args=args, train_dataset=dataset, **kwargs)


def outcome(trainer, resume=None) -> dict[str, Any]:
    """As `tiny.outcome`, but for the optimizer, with whole weights; and how many shards there are."""
    trainer.train(resume_from_checkpoint=resume)
    lines = trainer.state.log_history
    left = ("runtime", "per_second", "train_loss")
    return {
        "weights": whole_weights(trainer.model),
        "logs": [{k: v for k, v in line.items() if not any(part in k for part in left)} for line in lines],
        "shards": trainer.sampa.weights.count if trainer.sampa.weights.sharded else 0,
    }


@torch.no_grad()
def whole_weights(model) -> dict[str, Tensor]:
    """All of the weights, on all ranks."""
    model.reshard() if hasattr(model, "reshard") else None
    return {plain_name(name): whole(param).clone() for name, param in model.named_parameters()}


def shard(model, *units) -> Any:
    """`model` with FSDP2 over the world that there is."""
    for unit in units:
        fully_shard(unit)
    return fully_shard(model)


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, of all weights. Without biases of keys, whose gradient is a rounding of 0, of which Adam makes steps."""
    names = [name for name in expected if not name.endswith("key.bias")]
    far = torch.stack([(found[name] - expected[name]).double().norm() for name in names]).norm()
    return (far / torch.stack([expected[name].double().norm() for name in names]).norm()).item()
