"""One method of one object, for a while another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
