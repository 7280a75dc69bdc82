"""What is left of a displacement of the weights where mixed precision rounds them, as they are and displaced, before they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..functional import global_norm, inner, ratio


HALF = (torch.bfloat16, torch.float16)


class Rounded(TorchDispatchMode):
    """Notes which of `weights` are rounded to half precision in passes within its block, as autocast does before products.

    Attributes:
        to: their precision, by their place among `weights`.
    """

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.to: dict[int, torch.dtype] = {}
        self._places = {each.data_ptr(): i for i, each in enumerate(weights) if each.numel()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in HALF:
            place = self._places.get(args[0].data_ptr())
            if place is not None:
                self.to[place] = kwargs["dtype"]
        return func(*args, **kwargs)


@torch.no_grad()
def left_of_displacement(
    weights: Sequence[Tensor], displaced: Sequence[Tensor], to: Sequence[torch.dtype]
) -> tuple[float, float]:
    """Of eps = `displaced` - `weights` what is left, r(displaced) - r(weights), where r rounds each `to` its precision.

    Gives its Euclidean length, at least 0, that of eps being 1, and its cosine with eps, -1 to 1; 0 and 0 where nothing is left. Their
    product is its length along eps, 1 on average, as the errors of many weights cancel.
    """
    eps = [moved - own for own, moved in zip(weights, displaced, strict=True)]
    left = [
        moved.to(dtype).to(own) - own.to(dtype).to(own)
        for own, moved, dtype in zip(weights, displaced, to, strict=True)
    ]
    whole, rest = global_norm(eps).item(), global_norm(left).item()
    dot = inner(left, eps, (rest, whole)).sum().item() if rest and whole else 0.0
    return float(ratio(rest, whole)), float(ratio(dot, rest * whole))
