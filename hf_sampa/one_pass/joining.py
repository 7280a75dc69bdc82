"""Arguments of a module for two halves of a batch, joined along the first dimension, and what it returned, parted again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache


class Unlike(Exception):
    """The halves cannot be joined."""


def join(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    """`one` and `other`, structures of tensors and plain values, as those of the joint batch.

    Tensors whose first dimension is the batch, or is there to be repeated, are joined; vectors, as positions are, and everything else have
    to be the same in both.

    Args:
        one, other: of each half.
        sizes: of the halves, in samples.

    Raises:
        Unlike: they are different, or what a part of them means is not known.
    """
    (leaves, spec), (others, other_spec) = tree_flatten(one), tree_flatten(other)
    if spec != other_spec:
        raise Unlike
    return tree_unflatten([_join(*pair, sizes) for pair in zip(leaves, others, strict=True)], spec)


def _join(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _join_tensors(one, other, sizes)
    if isinstance(one, Cache) and isinstance(other, Cache):
        # What is written there while training nobody reads.
        if one.get_seq_length() or other.get_seq_length():
            raise Unlike
        return None
    plain = (type(None), bool, int, float, str, torch.dtype, torch.device)
    if type(one) is not type(other) or not isinstance(one, plain) or one != other:
        raise Unlike
    return one


def _join_tensors(one: Tensor, other: Tensor, sizes: tuple[int, int]) -> Tensor:
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        raise Unlike
    if one.ndim < 2:
        if one is not other and not torch.equal(one, other):
            raise Unlike
        return one
    halves = []
    for tensor, size in zip((one, other), sizes, strict=True):
        if len(tensor) not in (1, size):
            raise Unlike
        halves.append(tensor if len(tensor) == size else tensor.expand(size, *tensor.shape[1:]))
    return torch.cat(halves)


def parted(joint: Any, sizes: tuple[int, int]) -> tuple[Any, Any]:
    """What belongs to each half of a structure, some of whose tensors have a row for each sample of both. No tensor is copied."""
    if isinstance(joint, Tensor):
        return joint.split(sizes)  # of both at once: its gradient is put together once
    leaves, spec = tree_flatten(joint)
    halves = [_parted_leaf(leaf, sizes) for leaf in leaves]
    return tuple(tree_unflatten([each[half] for each in halves], spec) for half in (0, 1))


def parted_call(args: tuple, kwargs: dict[str, Any], sizes: tuple[int, int]) -> tuple[tuple, tuple]:
    """The arguments of a call, for each half; most are tensors or plain values, of which there is no structure to find."""
    pairs = [
        _parted_leaf(each, sizes)
        if each is None or isinstance(each, Tensor | float | int | str)
        else parted(each, sizes)
        for each in (*args, *kwargs.values())
    ]
    halves = ([pair[half] for pair in pairs] for half in (0, 1))
    return tuple((tuple(each[: len(args)]), dict(zip(kwargs, each[len(args) :], strict=True))) for each in halves)


def _parted_leaf(leaf: Any, sizes: tuple[int, int]) -> tuple[Any, Any]:
    joined = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == sum(sizes)
    return leaf.split(sizes) if joined else (leaf, leaf)


def rejoined(parts: Sequence[Any]) -> Any:
    """The reverse of `parted`: what a module that was run for each half returned, as if it had been run for both."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    (leaves, spec), (others, _) = map(tree_flatten, parts)
    joined = [
        torch.cat([one, other]) if isinstance(one, Tensor) and one.ndim else one
        for one, other in zip(leaves, others, strict=True)
    ]
    return tree_unflatten(joined, spec)
