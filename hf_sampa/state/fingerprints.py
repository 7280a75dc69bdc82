"""Numbers that two processes agree on when, and in practice only when, they hold the same batch or the same weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


# Enough to tell any two batches apart, little enough for a batch of images to cost nothing.
FINGERPRINT_ENTRIES = 4096


def fingerprint(batch: Any) -> int:
    """A number in [0, 2**63) that stands for a batch, or for anything that is made of plain values and tensors.

    Covers names, types, shapes and up to `FINGERPRINT_ENTRIES` evenly spread entries of each tensor.
    """
    digest = hashlib.blake2b(digest_size=8)
    _update_digest(digest, batch, set())
    return int.from_bytes(digest.digest(), "little") >> 1


def fingerprint_of_bits(tensors: Iterable[Tensor]) -> Tensor:
    """A number ``()``, int64, on the device of `tensors`, that covers every bit of them and their order; no host-device sync.

    Costs one pass over memory: the bits are added up as integers, eight bytes at a time, and the sums weighed by place.
    """
    found = [_sum_of_bits(tensor.detach()) for tensor in tensors]
    if not found:
        return torch.zeros((), dtype=torch.int64)
    device = found[0].device
    sums = torch.stack([each.to(device, non_blocking=True) for each in found])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=device)).sum()


def fingerprint_of_print(value: Any) -> int:
    """Of what ``print(value)`` shows, but for addresses in memory: layers without weights, of a model, and their settings."""
    return fingerprint(re.sub(r"0x[0-9a-f]+", "", repr(value)))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    # Not reshaped where it is dense: a transposed weight would be copied.
    size = tensor.numel()
    dense = size and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    flat = tensor.as_strided((size,), (1,)) if dense else tensor.reshape(-1)
    whole = size * tensor.element_size() // 8 * 8 // tensor.element_size()
    # A view of eight bytes needs an address that is a multiple of eight.
    if flat.data_ptr() % 8:
        flat = flat.clone()
    head = flat[:whole].view(torch.int64).sum() if whole else torch.zeros((), dtype=torch.int64, device=tensor.device)
    return head + flat[whole:].view(torch.uint8).sum() if whole < size else head


def _update_digest(digest, value: Any, inside: set[int]) -> None:
    if isinstance(value, Tensor) and value.is_nested:
        value = list(value.unbind())
    if isinstance(value, Tensor) and value.is_sparse:
        value = (tuple(value.shape), value.coalesce().indices(), value.coalesce().values())
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.frombuffer(bytearray(np.ascontiguousarray(value).tobytes() or b"\0"), dtype=torch.uint8)
    if isinstance(value, Tensor):
        entries = value.detach().reshape(-1)
        entries = entries[:: max(1, -(-entries.numel() // FINGERPRINT_ENTRIES))].contiguous().cpu()
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(entries.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(repr(key).encode())
            _update_digest(digest, value[key], inside)
    elif isinstance(value, list | tuple):
        digest.update(repr(len(value)).encode())
        for item in value:
            _update_digest(digest, item, inside)
    else:
        # The repr of other objects may name an address in memory.
        plain = isinstance(value, str | bytes | int | float | None)
        digest.update((repr(value) if plain else type(value).__qualname__).encode())
        if hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in inside:
            _update_digest(digest, vars(value), inside | {id(value)})
