"""FSDP2: what a process holds of tensors that are spread over the processes of its role, and who holds the rest.

`torch.distributed.fsdp.fully_shard` makes a `DTensor` of every parameter: a process of the role holds some of its rows. Each
role has a mesh of its own, of its k processes: of all as shards, or of replicas of shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from .roles import Mesh


def is_spread(tensor: Tensor) -> bool:
    """Whether processes hold parts of it."""
    return isinstance(tensor, DTensor)


def units(*modules: nn.Module) -> list[FSDPModule]:
    """The modules among these and those in them that FSDP2 gathers and lets go, each by itself."""
    return [each for module in modules for each in module.modules() if isinstance(each, FSDPModule)]


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that others know it by: FSDP2 gives what it shards one of its own, made from that."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def here(tensor: Tensor) -> Tensor:
    """What this process holds of it, in the same memory: a tensor that is not spread is itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def spread_as(tensor: Tensor, part: Tensor) -> Tensor:
    """`part` as what this process holds of something that is spread as `tensor` is, in the same memory."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def plain_name(name: str) -> str:
    """The name of a parameter or a buffer as it would be without the checkpointing that FSDP wraps layers in."""
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(tensor: Tensor) -> Tensor:
    """All of it. A collective of those that hold parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """Of `whole` what this process would hold, if it were spread as `tensor` is, or does, if it is."""
    if not isinstance(tensor, DTensor) or isinstance(whole, DTensor):
        return here(whole)
    at = next(dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard))
    parts, mine = whole.chunk(tensor.device_mesh.size(at)), tensor.device_mesh.get_coordinate()[at]
    return parts[mine] if mine < len(parts) else whole[:0]


@dataclass(frozen=True)
class Shards:
    """Who holds the parts of spread tensors.

    Attributes:
        count: S, into how many parts they are cut.
        mine: which of them is here.
        group: the processes that hold one whole together; None where the only part is here.
    """

    count: int
    mine: int
    group: dist.ProcessGroup | None


def shards_of(tensors: Sequence[Tensor], mesh: Mesh) -> Shards | None:
    """How `tensors` are spread, all in one way; None where none is. Raises ValueError for what is no FSDP2 within a role."""
    spread = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not spread:
        return None
    ways = {(each.device_mesh, each.placements) for each in spread}
    device_mesh, placements = next(iter(ways))
    at = [dim for dim, placement in enumerate(placements) if isinstance(placement, Shard)]
    known = all(isinstance(each, Replicate) or each == Shard(0) for each in placements)
    if len(ways) > 1 or len(at) != 1 or not known:
        raise ValueError(
            "Expected parameters that FSDP2 has sharded by rows over one mesh, but got DTensors that are placed as "
            f"{sorted(str(placed) for _, placed in ways)}. Tensor, expert and pipeline parallelism do not go with SAMPa: load "
            "the model without, or with DistributedConfig(fsdp_size=...) alone."
        )
    ranks, role = sorted(device_mesh.mesh.flatten().tolist()), mesh.roles[0] if mesh.paired else None
    wanted = mesh.ranks_of(role) if mesh.paired else list(range(mesh.world_size))
    mine = device_mesh.get_coordinate()[at[0]]
    # Made within a role's world, it counts the processes of that.
    if ranks not in (wanted, list(range(len(wanted)))) or mine != mesh.replica % device_mesh.size(at[0]):
        raise ValueError(
            f"Expected a model that is sharded over the processes of its role, ranks {wanted}, those of one replica next to one another, "
            f"but its mesh is {device_mesh.mesh.tolist()}. "
            "With method='sampa' each half of the processes holds a model of its own: shard or load it within `with "
            "args.world_of_role():`, or let fsdp=True do it."
        )
    group = device_mesh.get_group(at[0])
    return Shards(group.size(), mine, group if group.size() > 1 else None)
