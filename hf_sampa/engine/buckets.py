"""One number per trainable weight, in flat buckets: weights and gradients kept, sent and mixed without copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import BUCKET_BYTES, here, is_spread, partition, spread_as
from ..state import fingerprint_of_bits


# At least about so many, so that a pair that shares its optimizer can share few adapters evenly, too; and for each process two.
FEWEST_BUCKETS, FEWEST_EACH = 16, 2
# Bytes, at a multiple of which each parameter begins, as torch's own memory does: from other places kernels are slower, or add up in
# another order.
ALIGNED = 64
# Parameters in a bucket, at most, so that to cut it anew in every pass takes less than its memory is worth.
FEW = 32
# Of a bucket's numbers one in so many: what a parameter has at most that is taken together with others.
LITTLE_PART = 64


class Buckets:
    """Flat storage for one tensor per parameter.

    Args:
        params: what the storage is for.
        bucket_bytes: where to cut; a larger parameter has a bucket to itself. By default `BUCKET_BYTES`, or less for few
            weights.
        kinds: a value for each parameter; a bucket holds parameters of one kind.
        sizes: in bytes, by which buckets are cut; of `params` by default. Of shards, which differ a little, those of the largest,
            so that buckets hold the same parameters on all processes.
        fewest: about how many buckets few weights have at least.

    Attributes:
        flats: 1-d tensors of real numbers, each holding whole parameters of one dtype and device, in the order in which
            backward usually produces their gradients (the reverse of the model's), with zeros between them, see `ALIGNED`.
        views: per parameter, the part of `flats` that is its own, in its shape and memory layout.
        bucket_of: per parameter, the index into `flats`.
        members: per bucket, the indices of the parameters it holds, in the order of their places.
        sizes: per bucket, the sum of `sizes`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        bucket_bytes: int | None = None,
        kinds: Sequence[Any] | None = None,
        sizes: Sequence[int] | None = None,
        fewest: int = FEWEST_BUCKETS,
    ):
        sizes = [param.nbytes for param in params] if sizes is None else sizes
        if bucket_bytes is None:
            bucket_bytes = min(BUCKET_BYTES, sum(sizes) // fewest)
        self.bucket_of: list[int] = [0] * len(params)
        self.members: list[list[int]] = partition(params, bucket_bytes, kinds, sizes)
        self.sizes = [sum(sizes[i] for i in members) for members in self.members]
        self.flats: list[Tensor] = []
        # Not contiguous where the parameter is not, so that a kernel does not see another layout in displaced weights.
        self._layouts = [(param.shape, torch.empty_like(param, device="meta").stride()) for param in params]
        self._parts = [2 if param.is_complex() else 1 for param in params]  # real numbers per entry
        self.views: list[Tensor] = list(params)
        self._starts: list[int] = [0] * len(params)  # in its bucket
        self._sizes: list[int] = []
        for bucket, members in enumerate(self.members):
            first = params[members[0]]
            step, end = ALIGNED // first.dtype.to_real().itemsize, 0
            for i in members:
                self._starts[i] = -(-end // step) * step
                end = self._starts[i] + params[i].numel() * self._parts[i]
            self._sizes.append(end)
            flat = torch.zeros(end, dtype=first.dtype.to_real(), device=first.device)
            self.flats.append(flat)
            for i, view in zip(members, self.cut(bucket, flat), strict=True):
                self.bucket_of[i], self.views[i] = bucket, view

    def among(self, per_param: list[Tensor], bucket: int) -> list[Tensor]:
        """Those of the parameters of a bucket, which follow one another from last to first, in the order of its members."""
        members = self.members[bucket]
        return per_param[members[-1] : members[0] + 1][::-1]

    def cut(self, bucket: int, flat: Tensor) -> list[Tensor]:
        """Parts of `flat`, which is as long as the bucket, as the parameters of the bucket would have them; between them it is to be 0."""
        views = []
        for i in self.members[bucket]:
            (shape, stride), start = self._layouts[i], self._starts[i]
            if self._parts[i] == 1:
                views.append(flat.as_strided(shape, stride, start))
            else:
                pairs = flat.as_strided((*shape, 2), (*(2 * each for each in stride), 1), start)
                views.append(torch.view_as_complex(pairs))
        return views

    def swap(self, other: Buckets, buckets: Iterable[int]) -> None:
        """Exchange `buckets` with those of `other`, which must be cut alike; nothing is copied."""
        for bucket in buckets:
            self.flats[bucket], other.flats[bucket] = other.flats[bucket], self.flats[bucket]
            for i in self.members[bucket]:
                self.views[i], other.views[i] = other.views[i], self.views[i]

    def is_small(self, i: int) -> bool:
        """Whether a parameter has little part in its bucket."""
        return self._layouts[i][0].numel() * self._parts[i] * LITTLE_PART <= self._sizes[self.bucket_of[i]]

    def has_few(self, bucket: int) -> bool:
        """Whether a bucket's memory may be given back and taken anew in every pass."""
        return len(self.members[bucket]) <= FEW

    def take(self, i: int, grad: Tensor) -> None:
        """Put the gradient of parameter `i` into its place; a bucket of its own becomes `grad` itself, without a copy."""
        bucket = self.bucket_of[i]
        alone = len(self.members[bucket]) == 1 and grad.stride() == self._layouts[i][1] and not grad.is_conj()
        if alone and _is_sole_owner(grad):
            self.flats[bucket], self.views[i] = in_memory_order(grad), grad
        else:
            self.ensure(bucket)
            self.views[i].copy_(grad)

    def unshare(self) -> None:
        """Let go of buckets of which somebody else holds a part: an optimizer may keep a gradient as it was given it."""
        for bucket, members in enumerate(self.members):
            # The whole, and its views.
            if _users(self.flats[bucket]) > ALONE + len(members):
                self.release(bucket)

    def release(self, bucket: int) -> None:
        """Let go of a bucket's memory until it is `ensure`d. Whoever still holds a part of it, a callback perhaps, keeps it."""
        self._place(bucket, self.flats[bucket].new_empty(0))

    def ensure(self, bucket: int) -> None:
        """Take memory for a bucket that was released; one that was not keeps its content."""
        if self.flats[bucket].numel() < self._sizes[bucket]:
            self._place(bucket, self.room(bucket))

    def room(self, bucket: int) -> Tensor:
        """New memory as long as a bucket, ``(n,)``, with zeros between its parameters."""
        flat, alone = self.flats[bucket], len(self.members[bucket]) == 1
        return (flat.new_empty if alone else flat.new_zeros)(self._sizes[bucket])

    def _place(self, bucket: int, flat: Tensor) -> None:
        self.flats[bucket] = flat
        released = flat.numel() < self._sizes[bucket]
        views = [flat] * len(self.members[bucket]) if released else self.cut(bucket, flat)
        for i, view in zip(self.members[bucket], views, strict=True):
            self.views[i] = view


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries fill their memory without gaps, in whatever order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def in_memory_order(tensor: Tensor) -> Tensor:
    """All numbers of a dense tensor, ``(n,)``, in the order of their addresses; of a complex one real and imaginary parts."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_sole_owner(grad: Tensor) -> bool:
    """Whether nothing but `grad` holds its memory: autograd hands one tensor to several parameters where they are added."""
    return grad.untyped_storage().nbytes() == grad.nbytes and _users(grad) == ALONE


def _users(tensor: Tensor) -> int:
    """How many hold the memory of `tensor`; 0 where this torch does not say."""
    # Not public, though torch's own graph trees rest on it.
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count(tensor.untyped_storage()._cdata) if count else 0


# Of a tensor whose memory nobody else holds. From some version of torch on the handle by which users are counted is one, too.
ALONE = max(1, _users(torch.empty(1)))


class GradientRecorder:
    """Moves each gradient into its place in `Buckets` as backward produces it, and says when a bucket is full.

    Hooks stay registered until `close`; outside of `record` they do nothing.

    Args:
        params: the parameters whose gradients are wanted.
        overlap: whether a bucket is reported while backward is still running, or only after it.
        fresh: whether a sum begins without memory, which it takes as gradients come.
    """

    def __init__(self, params: Sequence[nn.Parameter], overlap: bool = True, fresh: bool = False):
        self.params, self.overlap, self.fresh = params, overlap, fresh
        self._spread = any(map(is_spread, params))
        self.used = [False] * len(params)
        # Whether a gradient has come in more than one piece, or was changed after it had come: seen while
        self.pieces = self.listening = False
        self._heard: dict[int, Tensor] = {}  # fingerprints of the gradients as they came
        self._into: Buckets | None = None
        self._on_full: Callable[[int], None] | None = None
        self._handles = [
            param.register_post_accumulate_grad_hook(partial(self._record, i)) for i, param in enumerate(params)
        ]
        self._grouped: dict[int, int] | None = None  # small parameters, by their ids, once they are taken in groups
        self._arrived: list[nn.Parameter] = []  # those of them whose gradients have come, and are to be taken

    def group(self, into: Buckets) -> None:
        """From now on take small gradients, as those of biases, in groups: with the next of another parameter, or after backward.

        A call of Python for each takes longer than all that is done with it. A bucket may then be full a moment before it is reported.
        """
        if self._grouped is not None:
            return
        self._grouped = {id(param): i for i, param in enumerate(self.params) if into.is_small(i)}
        for i in self._grouped.values():
            self._handles[i].remove()
            self._handles[i] = self.params[i].register_post_accumulate_grad_hook(self._arrived.append)

    def start(self, into: Buckets) -> None:
        """Forget gradients, so that the next backward starts a new sum in `into`."""
        self.used = [False] * len(self.params)
        for param in self.params:
            param.grad = None
        into.unshare()
        for bucket, members in enumerate(into.members):
            # Backward will bring memory for what is alone: large gradients need not be there twice.
            if len(members) == 1 or (self.fresh and into.has_few(bucket)):
                into.release(bucket)

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
        self._waiting = [len(members) for members in into.members]
        self._fired = [False] * len(self.params)
        self._next, self._heard = 0, {}
        self._arrived.clear()  # of passes that are none of ours
        try:
            yield
            self._take_assigned()
            self._finish(into)
        finally:
            self._into = self._on_full = None

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _record(self, i: int, param: nn.Parameter) -> None:
        into = self._into
        if into is None:
            return
        if self._arrived:
            self._take_arrived(into)
        if into.bucket_of[i] < self._sent:
            raise _late_piece(param)
        if param.grad is not into.views[i] and not _is_in(param.grad, into.views[i]):
            # From here on autograd, or FSDP2, adds further micro-batches in place.
            into.take(i, here(param.grad))
            param.grad = spread_as(param, into.views[i])
        if self.listening:
            self._heard[i] = fingerprint_of_bits([into.views[i]])
        self._count(i)
        if self.overlap:
            self._report()

    def _take_arrived(self, into: Buckets) -> None:
        """What `_record` does, for all small gradients that have come."""
        grads, views, sent, ensured = [], [], self._sent, None
        for param in self._arrived:
            i, grad = self._grouped[id(param)], param.grad
            if grad is None:  # taken away again
                continue
            bucket = into.bucket_of[i]
            if bucket < sent:
                raise _late_piece(param)
            if bucket != ensured:
                into.ensure(bucket)
                ensured = bucket
            view = into.views[i]
            if grad is not view and not (self._spread and _is_in(grad, view)):
                grads.append(here(grad) if self._spread else grad)
                views.append(view)
                param.grad = spread_as(param, view) if self._spread else view
            self._count(i)
        self._arrived.clear()
        if grads:
            torch._foreach_copy_(views, grads)
        if self.overlap:
            self._report()

    @property
    def _sent(self) -> int:
        """How many buckets are on their way."""
        return 0 if self._on_full is None else self._next

    def _count(self, i: int) -> None:
        self.used[i] = True
        self.pieces |= self._fired[i]
        if not self._fired[i]:
            self._fired[i] = True
            self._waiting[self._into.bucket_of[i]] -= 1

    def _take_assigned(self) -> None:
        """Gradients that a step of one's own put into ``.grad``, or changed there, after backward or without it."""
        self._take_arrived(self._into)
        for i, param in enumerate(self.params):
            grad = param.grad
            if grad is None:
                if self.used[i] and self._into.views[i].numel():  # not sent and let go
                    self._drop(i)
            elif grad is not self._into.views[i] and not _is_in(grad, self._into.views[i]):
                self._record(i, param)
        if self.listening:
            now = {i: fingerprint_of_bits([self._into.views[i]]) for i in self._heard}
            self.pieces |= any(bool(now[i] != before) for i, before in self._heard.items())

    def _drop(self, i: int) -> None:
        """A gradient that was taken away after backward: of this micro-batch, and of those before it."""
        if self._into.bucket_of[i] < self._sent:
            raise RuntimeError(
                f"The gradient of a parameter of shape {tuple(self.params[i].shape)} was set to None after it had been sent to the "
                "other process. Do so from the first step on, or set overlap_exchange=False, which sends gradients at the end."
            )
        self._into.views[i].zero_()
        self.used[i], self.pieces = False, True

    def _report(self) -> None:
        while self._on_full is not None and self._next < len(self._waiting) and self._waiting[self._next] == 0:
            self._next += 1
            self._on_full(self._next - 1)

    def _finish(self, into: Buckets) -> None:
        if self._on_full is None:
            return
        # A parameter without a gradient counts as zero.
        for i, used in enumerate(self.used):
            if not used:
                into.ensure(into.bucket_of[i])
                into.views[i].zero_()
        self._waiting = [0] * len(self._waiting)
        self._report()


def _is_in(grad: Tensor, view: Tensor) -> bool:
    """Whether what is here of a gradient that FSDP2 has sharded is in its place already."""
    return is_spread(grad) and here(grad).data_ptr() == view.data_ptr()


def _late_piece(param: Tensor) -> RuntimeError:
    return RuntimeError(
        f"A parameter of shape {tuple(param.shape)} received its gradient in more than one piece during one "
        "step, after the first piece had been sent to the other process. Reentrant activation checkpointing "
        "does this, and so does a training_step of your own that calls backward twice: set "
        "overlap_exchange=False, which sends gradients after all of them, or, for checkpointing, "
        "gradient_checkpointing_kwargs={'use_reentrant': False}."
    )
