"""One method of one object, for a while another; and the weights of a model, for a while others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def stood_in(owner: Any, method: str, other: Callable) -> Iterator[None]:
    """Within the block, whoever calls the `method` of `owner`, an object, calls `other`."""
    before = vars(owner).get(method)
    setattr(owner, method, other)
    try:
        yield
    finally:
        delattr(owner, method)
        if before is not None:
            setattr(owner, method, before)


@contextmanager
def holding(params: Iterable[nn.Parameter], others: Iterable[Tensor]) -> Iterator[None]:
    """Within the block `params` hold `others`, of their shapes; afterwards what they held, in its memory. Nothing is copied."""
    own = [(param, param.data) for param in params]
    try:
        for (param, _), other in zip(own, others, strict=True):
            param.data = other
        yield
    finally:
        for param, data in own:
            param.data = data
