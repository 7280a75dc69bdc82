"""One gradient at a time: forward and backward at displaced weights, in buckets that travel while backward still runs.

Nothing here knows of Trainer: a `Backward` runs one micro-batch of a `Batch` forward and backward and returns its share of
the batch's mean loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..distributed import Exchange, Role, check_ranks_agree
from ..functional import norms, ratio
from ..state import ForwardState, fingerprint
from .buckets import FEWEST_BUCKETS, FEWEST_EACH, Buckets, GradientRecorder, is_dense
from .passes import Batch, Found, Pass
from .placement import Placement
from .trained import Trained
from .weights import weights_of


logger = logging.getLogger(__name__)

Backward = Callable[..., Tensor]
TRIAL_STEPS = 3  # with finite gradients, one after the other


@dataclass
class Sums:
    """Of the buckets of one gradient."""

    only: Sequence[bool] | None = None  # parameters that are wanted

    norms: dict[int, Tensor] = field(default_factory=dict)  # by bucket
    dots: list[Tensor] = field(default_factory=list)  # of each bucket with the displacement
    held_back: list[Callable[[], None]] = field(default_factory=list)


class Gradients:
    """What computes g_t and g~_t, and tells all processes what it found.

    Weights are displaced by pointing the parameters to other memory: x_t itself is not written to before the base
    optimizer's step. That memory is where g_t was, and receives the other role's gradient as soon as backward is done
    with it, so that a process holds 5 d numbers with Adam: weights, displaced weights, gradient, two moments. Where no other
    role's gradient comes, the gradient takes as much as displaced weights give back: 4 d for SAM, 5 d for SAMPa in both roles.

    Args:
        model: what is trained.
        trained: the parameters that are, which the base optimizer holds.
        exchange: connects the processes.
        others: modules with a part in the loss besides the model, by name.
        overlap: whether gradients travel while backward is still running; that needs a model whose backward does not read
            a weight any more once its gradient is complete.
        unscale: gives what to multiply gradients by before anything else sees them, a scalar tensor ``()``.
        partial_backward: whether backward leaves out gradients that nobody needs. Not for a compiled model, which would be
            compiled once more for every choice.

    Attributes:
        placement: where all these numbers are; set by who knows the base optimizer.
        forward_state: buffers and whatever else forward changes.
        reported: the role whose passes are, in the step in progress, those whose loss is reported; None: no pass is.
        digest_of_rest: stands for what passes leave besides gradients and the forward state,
        share_rest: makes it the same on both halves of a pair, where
        rest_differs says so: whether the two had different ones when numbers were last shared.
        receives: whether the other role's gradient is on its way during a pass.
    """

    placement: Placement
    receives = True
    reported: Role | None = None
    digest_of_rest: Callable[[], int] = staticmethod(lambda: 0)
    share_rest: Callable[[], None] = staticmethod(lambda: None)
    rest_differs = False

    def __init__(
        self,
        model: nn.Module,
        trained: Trained,
        exchange: Exchange,
        *,
        others: Mapping[str, nn.Module] | None = None,
        overlap: bool = True,
        unscale: Callable[[], Tensor] | None = None,
        partial_backward: bool = True,
    ):
        self.model, self.trained = model, trained
        self.names, self.params, self.of_model = trained.names, trained.params, trained.of_model
        modules = {"": model, **(others or {})}
        self.weights = weights_of(self.params, self.names, list(modules.values()), exchange)
        for param in self.params:
            # Displaced weights have no gaps, and where they have them a kernel may add up in another order. A model that is moved to
            # another device loses its gaps, too.
            if not self.weights.sharded and not is_dense(param):
                param.data = torch.empty_like(param).copy_(param.detach())
        self.forward_state = ForwardState(modules, self.params, exchange)
        # FSDP2 asked every parameter whether it wants a gradient when it took it.
        self.partial_backward = partial_backward and not self.weights.sharded
        self.exchange, self.unscale = exchange, unscale
        self.perturbed_grads = self.buckets()  # g~_t, then G_t
        self.ascent_grads = self.buckets()  # g_t, then displaced weights, then the other role's gradient
        # Without another role's gradient to come, displaced weights give their memory back as backward is done with them.
        self._lets_go = not exchange.mesh.paired
        self._recorder = GradientRecorder(self.params, overlap, fresh=self._lets_go)
        # Steps that have yet to show that backward reads no weight whose gradient is complete: autograd cannot tell of all.
        self._trial = TRIAL_STEPS if overlap else 0
        self.first_pass, self._overlap = True, overlap  # the first pass shows how gradients come
        self._displacement: float | Tensor = 0.0  # ||x~_t - x_t||
        self._on_their_way: dict[int, int] = {}  # buckets, with their versions

    def buckets(self) -> Buckets:
        """Room for one number per trained weight; the model's and others in buckets of their own, with norms of their own."""
        kinds = [i < self.of_model for i in range(len(self.params))]
        fewest = max(FEWEST_BUCKETS, FEWEST_EACH * self.exchange.mesh.world_size)
        return Buckets(self.weights.here(), kinds=kinds, sizes=self.weights.sizes(), fewest=fewest)

    def connect(self, exchange: Exchange) -> None:
        """Reach the other processes by `exchange` from here on."""
        self.weights.exchange = self.exchange = self.forward_state.exchange = self.placement.exchange = exchange

    def close(self) -> None:
        """Take the hooks off model and optimizer."""
        self._recorder.close()
        self.placement.close()

    @contextmanager
    def displaced(self, weights: Buckets, keep_statistics: bool = False) -> Iterator[list[Tensor]]:
        """Within the block the model holds `weights`; afterwards, whatever happened, it holds x_t, bit for bit. Gives x_t.

        Running statistics, and whatever else forward changes, come from one pass per batch, that of the LOOKAHEAD role:
        with `keep_statistics`, what the block leaves behind in them is undone.
        """
        self.weights.settle()
        with self.forward_state.kept() if keep_statistics else nullcontext():
            x = self.weights.move(weights)
            try:
                yield x
            finally:
                self.weights.move_back(weights, x)

    def gradient_at(
        self,
        weights: Buckets,
        role: Role,
        batch: Batch,
        backward: Backward,
        into: Buckets,
        *,
        only: Sequence[bool] | None = None,
        keep_statistics: bool = False,
        local: bool = False,
    ) -> Found:
        """As `gradient`, at `weights`, which then holds the other role's gradient."""
        try:
            with self.displaced(weights, keep_statistics) as x:
                return self.gradient(role, batch, backward, into, weights, x, only, local)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "Backward read a weight whose gradient was complete, so that its memory had been given to the other "
                "process's gradient (or backward read something that the model itself overwrote). Detached weights and "
                "reentrant checkpointing do this: set overlap_exchange=False, which sends gradients after backward."
            ) from error

    def gradient(
        self,
        role: Role,
        batch: Batch,
        backward: Backward,
        into: Buckets,
        weights: Buckets | None = None,
        x: list[Tensor] | None = None,
        only: Sequence[bool] | None = None,
        local: bool = False,
        theirs: Buckets | None = None,
    ) -> Found:
        """Gradient of f on `batch` at the weights as they are, averaged over replicas, into `into`.

        Where the weights are displaced, `weights` are their buckets, which the other role's gradient is then written to, and `x` is x_t;
        where they are not, that is written to `theirs`, if given. Parameters that `only` leaves out are
        taken for constants, their gradient for zero. A `local` gradient is neither averaged nor sent. On trial, a weight becomes NaN as soon
        as its gradient is complete, and gradients travel after backward: whoever reads it later has no finite gradient.
        """
        sums, self._on_their_way = Sums(only), {}
        listening = self._listen()
        on_full = partial(
            self._send, role=role, into=into, weights=weights, x=x, local=local, theirs=theirs, sums=sums
        )
        self._recorder.start(into)
        micro_batches = list(batch)
        losses = []
        with record_function("SAMPa.gradient"), self._frozen(only), self.forward_state.noted():
            for i, micro_batch in enumerate(micro_batches):
                last = i + 1 == len(micro_batches)
                with self._recorder.record(into, on_full if last else None), self.weights.adding_up(not last):
                    losses.append(backward(micro_batch, role))
        self._check_left_alone(into)
        for start in sums.held_back:
            start()
        self.exchange.finish()
        if listening and any(self._recorder.used):
            self._heard()
        loss, (norm, of_model) = torch.stack(losses).sum().double(), self.norms(sums)
        dots = torch.stack(sums.dots).double().sum() if sums.dots else torch.zeros_like(loss)
        dot = ratio(self.weights.of_sums(dots[None])[0], self._displacement)
        used = self._recorder.used
        wanted = used if only is None else [a and b for a, b in zip(used, only, strict=True)]
        return Found(batch.fingerprint, loss, norm, dot, wanted, of_model)

    def _listen(self) -> bool:
        """In the first pass of a run nothing travels before backward is through; returns whether this is that pass."""
        if self.first_pass:
            self._recorder.overlap, self._recorder.listening = False, self._overlap
        return self.first_pass

    def _heard(self) -> None:
        """After the first pass: gradients that come in pieces are sent after backward in all others, too."""
        self.first_pass, self._recorder.listening = False, False
        self._recorder.overlap = self._overlap and not self._recorder.pieces
        if self._overlap and self._recorder.pieces:
            self._trial = 0
            logger.info(
                "Gradients come in several pieces or are changed after backward, as with reentrant checkpointing, losses that "
                "call backward themselves or steps of one's own: they are sent after backward, not during it."
            )

    def _send(
        self,
        bucket: int,
        role: Role,
        into: Buckets,
        weights: Buckets | None,
        x: list[Tensor] | None,
        local: bool,
        theirs: Buckets | None,
        sums: Sums,
    ) -> None:
        """Let a full bucket go on its way, or, on trial, hold it back until backward is through; see `gradient`."""
        members, grad = into.members[bucket], into.flats[bucket]
        for i in members if sums.only and not self.partial_backward else []:
            if not sums.only[i]:
                into.views[i].zero_()
        if self.unscale:
            grad.mul_(self.unscale())
        if weights is not None and role is Role.PERTURBED:
            sums.dots.append(self.placement.displacement_dot(bucket, weights, x, grad))

        def start() -> None:
            if weights is not None:
                # Backward has read these weights for the last time.
                (self.weights.let_go if self._lets_go else self.weights.leave)(bucket, weights)
            if local:
                ready()
            else:
                place = theirs if weights is None else weights
                self.placement.travel(bucket, into, place if self.receives else None, ready)

        ready = self.norm_of(bucket, into, sums)
        on_trial = weights is not None and self._trial
        if on_trial:
            self.weights.spoil(bucket, weights)
        if on_trial and (self.weights.sharded or not self._lets_go):
            sums.held_back.append(start)
        else:
            start()
            # What goes on by itself changes gradients when another one starts, and not between the last one and the end of a pass.
            self._on_their_way = {i: into.flats[i]._version for i in (*self._on_their_way, bucket)}

    def _check_left_alone(self, grads: Buckets) -> None:
        """Raise RuntimeError where gradients were changed after backward, which others have as they were before."""
        changed = any(grads.flats[i]._version != version for i, version in self._on_their_way.items())
        if changed and self.exchange.mesh.world_size > 1:
            raise RuntimeError(
                "overlap_exchange: expected gradients that training_step changes from the first step on, or never, but it began to in this "
                "step, when they were on their way to the other processes. Set overlap_exchange=False, which sends them after backward."
            )

    @contextmanager
    def _frozen(self, only: Sequence[bool] | None) -> Iterator[None]:
        left_out = only and self.partial_backward
        frozen = [param for param, kept in zip(self.params, only, strict=True) if not kept] if left_out else []
        try:
            for param in frozen:
                param.requires_grad_(False)
            yield
        finally:
            for param in frozen:
                param.requires_grad_(True)

    def norm_of(self, bucket: int, grads: Buckets, sums: Sums) -> Callable[[], None]:
        """What takes the norm of a bucket into `sums`, once it is the mean."""
        # Must not know of `sums`, which may hold it: a cycle would keep the gradient in memory.
        found, grad = sums.norms, grads.flats[bucket]
        return lambda: found.__setitem__(bucket, norms([grad])[0])

    def norms(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """Euclidean norms ``()`` over all weights and over the model's."""
        zero, members = torch.zeros((), dtype=torch.float64, device=self.params[0].device), self.ascent_grads.members
        own = torch.stack([sums.norms.get(bucket, zero) for bucket in range(len(members))])
        by_bucket = self.placement.in_any_replica(own)
        of_model = [bucket for bucket, (i, *_) in enumerate(members) if i < self.of_model]
        several = [by_bucket] if len(of_model) == len(members) else [by_bucket, by_bucket[of_model]]
        here = torch.stack([norms([each])[0] for each in several])
        of_all = self.weights.of_norms(here)
        return of_all[0], of_all[-1]

    def _share(self, passes: dict[Role, Found], dot_left: Tensor | float = 0.0) -> dict[Role, Pass]:
        """Tell all ranks what this one found in each role it plays; one small all-gather and one host-device sync.

        With it travels what must be equal on all ranks: the weights x_t, and settings that may change during a run.

        dot_left: as of `Placement.dot_left`.
        """
        device, count = self.params[0].device, len(self.params)
        numbers, integers = torch.zeros(2, 4, dtype=torch.float64, device=device), torch.zeros(2, 1 + count).long()
        for role, found in passes.items():
            numbers[role] = torch.stack([found.loss, found.norm, found.dot, found.model_norm])
            integers[role] = torch.tensor([found.fingerprint, *found.used])
        replicas = self.exchange.mesh.num_replicas
        numbers[Role.PERTURBED, 2] += ratio(dot_left * replicas, self._displacement)
        row = torch.cat([numbers.view(torch.int64), integers.to(device, non_blocking=True)], dim=1)
        with record_function("SAMPa.exchange"):
            of_all, signatures = self._gather(row.flatten())
            rows = of_all.view(-1, *row.shape)
            source = self.exchange.mesh.ranks_of(Role.LOOKAHEAD)[0]
            self.forward_state.share(source, alike=len(set(signatures)) == 1)
        shared = {}
        for role in Role if self.exchange.mesh.paired else passes:
            of_role = rows[self.exchange.mesh.ranks_of(role), role]
            loss, norm, _, model_norm = of_role[:, :4].contiguous().view(torch.float64).mean(dim=0).tolist()
            dot = sum(rows[:, role, 2].contiguous().view(torch.float64).tolist()) / replicas
            used = of_role[:, 5:].any(dim=0).tolist()
            shared[role] = Pass(loss, norm, dot, tuple(of_role[:, 4].tolist()), tuple(used), model_norm)
        return shared

    def _gather(self, row: Tensor) -> tuple[Tensor, list[int]]:
        """Rows of all ranks, on the CPU, and their signatures of what forward moves. Raises RuntimeError for ranks that differ."""
        if self.exchange.mesh.world_size == 1:
            return self.exchange.gather(row).cpu(), [0]
        with record_function("SAMPa.check"):
            own = [self.digest_of_rest(), self.forward_state.signature(), fingerprint(self.settings())]
            digests = torch.tensor(own).to(row.device, non_blocking=True)
            row = torch.cat([row, digests, self.placement.digest_of_weights().view(1).to(row.device)])
        rows = self.exchange.gather(row).cpu()
        rest, signatures, settings, weights = rows[:, -4:].T.tolist()
        mesh = self.exchange.mesh
        check_ranks_agree(self.exchange, weights, settings, self.settings(), self.weights.count)
        of_roles = [[rest[rank] for rank in mesh.ranks_of(role)] for role in Role]
        self.rest_differs = of_roles[0] != of_roles[1]
        return rows[:, :-4], signatures

    def settings(self) -> dict[str, float]:
        """What the step is computed with and may change between steps; equal on all ranks."""
        return {}
