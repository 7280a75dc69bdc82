"""One number per trainable weight, in flat buckets: gradients kept, sent and mixed without per-parameter copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


# Large enough that a bucket's latency does not matter, small enough that the first one leaves early in backward.
BUCKET_BYTES = 4 * 2**20


class Buckets:
    """Flat storage for one tensor per parameter.

    Attributes:
        flats: 1-d tensors, each holding whole parameters of one dtype and device, in the order in which backward
            usually produces their gradients (the reverse of the model's).
        views: per parameter, the part of `flats` that is its own, in its shape.
        bucket_of: per parameter, the index into `flats`.
        sizes: per bucket, how many parameters it holds.
    """

    def __init__(self, params: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES):
        self.flats: list[Tensor] = []
        self.bucket_of: list[int] = [0] * len(params)
        self.sizes: list[int] = []
        views: list[Tensor | None] = [None] * len(params)
        for members in _partition(params, bucket_bytes):
            first = params[members[0]]
            flat = torch.zeros(sum(params[i].numel() for i in members), dtype=first.dtype, device=first.device)
            start = 0
            for i in members:
                views[i] = flat[start : start + params[i].numel()].view(params[i].shape)
                self.bucket_of[i] = len(self.flats)
                start += params[i].numel()
            self.flats.append(flat)
            self.sizes.append(len(members))
        self.views: list[Tensor] = views

    @property
    def nbytes(self) -> int:
        """Bytes in all buckets."""
        return sum(flat.nbytes for flat in self.flats)


def _partition(params: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """Indices of `params` from last to first, cut where a bucket is full or dtype or device change."""
    groups: list[list[int]] = []
    filled = 0
    for i in reversed(range(len(params))):
        fits = groups and filled + params[i].nbytes <= bucket_bytes
        alike = groups and (params[groups[-1][0]].dtype, params[groups[-1][0]].device) == (
            params[i].dtype,
            params[i].device,
        )
        if not (fits and alike):
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += params[i].nbytes
    return groups


class GradientRecorder:
    """Moves each gradient into its place in `Buckets` as backward produces it, and says when a bucket is full.

    Hooks stay registered until `close`; outside of `record` they do nothing.
    """

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params = params
        self.used = [False] * len(params)
        self._into: Buckets | None = None
        self._on_full: Callable[[int], None] | None = None
        self._handles = [
            param.register_post_accumulate_grad_hook(lambda param, i=i: self._record(i, param))
            for i, param in enumerate(params)
        ]

    def start(self) -> None:
        """Forget gradients, so that the next backward starts a new sum."""
        self.used = [False] * len(self.params)
        for param in self.params:
            param.grad = None

    @contextmanager
    def record(self, into: Buckets, on_full: Callable[[int], None] | None = None):
        """Add the gradients of the backward passes inside the block to the sum in `into`.

        Args:
            into: where the gradients go.
            on_full: called with a bucket's index once every parameter of it has had its gradient in this block and
                all buckets before it are full too, so that all processes see one order. Set it on the last pass of
                a sum only. Buckets with a parameter that got no gradient are reported when the block ends.
        """
        self._into, self._on_full = into, on_full
        self._waiting = list(into.sizes)
        self._fired = [False] * len(self.params)
        self._next = 0
        try:
            yield
            self._finish(into)
        finally:
            self._into = self._on_full = None

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _record(self, i: int, param: nn.Parameter) -> None:
        if self._into is None:
            return
        view, bucket = self._into.views[i], self._into.bucket_of[i]
        if self._on_full is not None and bucket < self._next:
            raise RuntimeError(
                f"A parameter of shape {tuple(param.shape)} received its gradient in more than one piece during one "
                "backward pass, after the first piece had been sent to the other process. Reentrant activation "
                "checkpointing does this: set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if param.grad is not view:
            # From here on autograd adds further micro-batches in place.
            view.copy_(param.grad)
            param.grad = view
        self.used[i] = True
        if not self._fired[i]:
            self._fired[i] = True
            self._waiting[bucket] -= 1
            self._report()

    def _report(self) -> None:
        while self._on_full is not None and self._next < len(self._waiting) and self._waiting[self._next] == 0:
            self._next += 1
            self._on_full(self._next - 1)

    def _finish(self, into: Buckets) -> None:
        if self._on_full is None:
            return
        # A parameter without a gradient counts as zero.
        for used, view in zip(self.used, into.views, strict=True):
            if not used:
                view.zero_()
        self._waiting = [0] * len(self._waiting)
        self._report()
