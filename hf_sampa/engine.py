"""What the sharpness-aware steps are made of: displaced weights, gradients in buckets, and the numbers of a step.

Nothing here knows of Trainer: `gradient` runs one micro-batch of a `Batch` forward and backward and returns its share of
the batch's mean loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from .buckets import Buckets, GradientRecorder
from .exchange import Exchange
from .functional import NORM_GUARD, displacement_dot_
from .passes import Batch, Found, Pass, StepReport
from .roles import Role


MAX_SKIPPED_IN_A_ROW = 20
TRIAL_STEPS = 3  # with finite gradients, one after the other


class SharpnessAware:
    """What SAMPa and SAM have in common: displaced weights, gradients in buckets, the numbers of a step.

    Weights are displaced by pointing the parameters to other memory: x_t itself is not written to before the base
    optimizer's step. That memory is where g_t was, and receives the other role's gradient as soon as backward is done
    with it, so that a process holds 5 d numbers with Adam: weights, displaced weights, gradient, two moments.

    Args:
        model: what is trained: its parameters with `requires_grad`.
        base_optimizer: holds them, takes the step afterwards.
        exchange: connects the processes.
        rho: radius of the perturbation, >= 0.
        overlap: whether gradients travel while backward is still running; that needs a model whose backward does not read
            a weight any more once its gradient is complete.
        unscale: gives what to multiply gradients by before anything else sees them, a scalar tensor ``()``.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Optimizer,
        exchange: Exchange,
        *,
        rho: float,
        overlap: bool = True,
        unscale: Callable[[], Tensor] | None = None,
    ):
        trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.names, self.params = list(trainable), list(trainable.values())
        self._buffers = _saved_buffers(model)
        self.base_optimizer, self.exchange, self.rho, self.unscale = base_optimizer, exchange, rho, unscale
        self.roles = exchange.mesh.roles
        self.perturbed_grads = Buckets(self.params)  # g~_t, then G_t
        self.ascent_grads = Buckets(self.params)  # g_t, then displaced weights, then the other role's gradient
        self.owned = range(len(self.ascent_grads.flats))  # buckets that this process updates
        self.reached: set[int] = set()  # parameters of which G_t has a part, on whichever process
        self.skipped_steps = self.skipped_in_a_row = 0
        self._recorder = GradientRecorder(self.params, overlap)
        # Steps that have yet to show that backward reads no weight whose gradient is complete: autograd cannot tell of all.
        self._trial = TRIAL_STEPS if overlap else 0

    @property
    def statistics(self) -> list[Tensor]:
        """Running statistics and other buffers that a checkpoint holds; forward may put new tensors in their places."""
        return [module.get_buffer(name) for module, name in self._buffers]

    def close(self) -> None:
        """Take the hooks off the model."""
        self._recorder.close()

    def check_state(self) -> None:
        """Raise ValueError, on all ranks, where optimizer state is missing that another process has. A collective.

        So it is after a run that shared the optimizer, if another one, or one with other frozen layers, goes on with it.
        """
        has = torch.tensor([bool(self.base_optimizer.state.get(param)) for param in self.params])
        known = self.exchange.gather(has.long().to(self.params[0].device)).cpu().any(dim=0)
        own = self._owned_params()
        whole = torch.equal(has[own], known[own])
        if not self.exchange.gather(torch.tensor([whole]).long().to(self.params[0].device)).all():
            raise ValueError(
                "Expected every process to hold the optimizer state of the parameters that it updates, but some of it is "
                "in another process, where a run with shard_optimizer=True left it. Resume from a checkpoint of that run, "
                "or give this one a new trainer."
            )

    @contextmanager
    def displaced(self, role: Role, weights: Buckets):
        """Within the block the model holds `weights`; afterwards, whatever happened, it holds x_t, bit for bit.

        Running statistics, and whatever else forward changes in the model's buffers, come from the LOOKAHEAD pass, once
        per batch: what the PERTURBED pass leaves behind is undone.
        """
        kept = [each.clone() for each in self.statistics] if role is Role.PERTURBED else []
        x = [param.data for param in self.params]
        try:
            for param, moved in zip(self.params, weights.views, strict=True):
                param.data = moved
            yield x
        finally:
            for param, own in zip(self.params, x, strict=True):
                param.data = own
            for (module, name), before in zip(self._buffers, kept, strict=False):
                module.get_buffer(name).copy_(before)

    def _gradient_at(self, weights: Buckets, role: Role, batch: Batch, gradient: Callable, into: Buckets) -> Found:
        """Gradient of f on `batch` at `weights`, into `into`; `weights` then holds the other role's gradient."""
        try:
            with self.displaced(role, weights) as x:
                return self._gradient(role, batch, gradient, into, weights, x)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "Backward read a weight whose gradient was complete, so that its memory had been given to the other "
                "process's gradient (or backward read something that the model itself overwrote). Detached weights and "
                "reentrant checkpointing do this: set overlap_exchange=False, which sends gradients after backward."
            ) from error

    def _gradient(
        self,
        role: Role,
        batch: Batch,
        gradient: Callable,
        into: Buckets,
        weights: Buckets | None = None,
        x: list[Tensor] | None = None,
    ) -> Found:
        """Gradient of f on `batch` at the weights as they are, averaged over replicas, into `into`.

        Where the weights are displaced, `weights` are their buckets and `x` is x_t. On trial, a weight becomes NaN as soon
        as its gradient is complete, and gradients travel after backward: whoever reads it later has no finite gradient.
        """
        norms: list[Tensor] = []
        dots: list[Tensor] = []
        held_back: list[Callable[[], None]] = []

        def on_full(bucket: int) -> None:
            members, grad = into.members[bucket], into.flats[bucket]
            if self.unscale:
                grad.mul_(self.unscale())
            if weights is not None:
                # Backward has read these weights for the last time. Should it read them after all, autograd will say so.
                torch.autograd.graph.increment_version([self.params[i] for i in members])
                if role is Role.PERTURBED:
                    moved = [weights.views[i] for i in members]
                    dots.append(displacement_dot_(moved, [x[i] for i in members], grad, weights.flats[bucket]))
            start = partial(
                self._start_exchange, bucket, into, weights, lambda: norms.append(torch.linalg.vector_norm(grad))
            )
            if weights is not None and self._trial:
                weights.flats[bucket].fill_(float("nan"))
                held_back.append(start)
            else:
                start()

        self._recorder.start(into)
        micro_batches = list(batch)
        losses = []
        with record_function("SAMPa.gradient"):
            for i, micro_batch in enumerate(micro_batches):
                with self._recorder.record(into, on_full if i + 1 == len(micro_batches) else None):
                    losses.append(gradient(micro_batch))
        for start in held_back:
            start()
        self.exchange.finish()
        loss, norm = torch.stack(losses).sum().double(), torch.linalg.vector_norm(torch.stack(norms).double())
        dot = torch.stack(dots).double().sum() if dots else torch.zeros_like(loss)
        return Found(batch.fingerprint, loss, norm, dot, self._recorder.used)

    def _start_exchange(self, bucket: int, into: Buckets, weights: Buckets | None, ready: Callable[[], None]) -> None:
        theirs = None if weights is None else weights.flats[bucket]
        self.exchange.start(into.flats[bucket], theirs, ready=ready)

    def _share(self, passes: dict[Role, Found]) -> dict[Role, Pass]:
        """Tell all ranks what this one found in each role it plays; one small all-gather and one host-device sync."""
        device, count = self.params[0].device, len(self.params)
        numbers, integers = torch.zeros(2, 3, dtype=torch.float64, device=device), torch.zeros(2, 1 + count).long()
        for role, found in passes.items():
            numbers[role] = torch.stack([found.loss, found.norm, found.dot])
            integers[role] = torch.tensor([found.fingerprint, *found.used])
        row = torch.cat([numbers.view(torch.int64), integers.to(device)], dim=1)
        with record_function("SAMPa.exchange"):
            rows = self.exchange.gather(row).cpu()
            self.exchange.broadcast(self.statistics, source=self.exchange.mesh.ranks_of(Role.LOOKAHEAD)[0])
        shared = {}
        for role in Role:
            of_role = rows[self.exchange.mesh.ranks_of(role), role]
            loss, norm, dot = of_role[:, :3].contiguous().view(torch.float64).mean(dim=0).tolist()
            used = of_role[:, 4:].any(dim=0).tolist()
            shared[role] = Pass(loss, norm, dot, tuple(of_role[:, 3].tolist()), tuple(used))
        return shared

    def _finish(self, ascent: Pass, perturbed: Pass, loss: float, used: Sequence[bool], skipped: bool) -> StepReport:
        """Put G_t (or, where the step is skipped, nothing) into ``.grad``."""
        if self._trial:
            self._trial = TRIAL_STEPS if skipped else self._trial - 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps += skipped
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"Expected a finite gradient at least once in {MAX_SKIPPED_IN_A_ROW} steps, but got NaN or infinity "
                f"in all of the last {self.skipped_in_a_row}. Lower the learning rate or rho, and look for bad values "
                f"in the data; the weights are those of the last good step.{self.late_reader()}"
            )
        self.reached = {i for i, is_used in enumerate(used) if is_used and not skipped}
        for param in self.params:
            param.grad = None
        for i in self.reached.intersection(self._owned_params()):
            self.params[i].grad = self.perturbed_grads.views[i]
        return StepReport(
            loss=loss,
            perturbed_loss=perturbed.loss,
            sharpness=perturbed.loss - ascent.loss,
            ascent_grad_norm=ascent.norm,
            ascent_cosine=perturbed.dot / (self.rho * perturbed.norm + NORM_GUARD),
            skipped=skipped,
        )

    def late_reader(self) -> str:
        """What else may be behind a bad gradient in the first steps; empty afterwards."""
        return (
            " In the first steps a weight becomes NaN once its gradient is complete: if the run is well with "
            "overlap_exchange=False, the model's backward reads a weight after that, as weight.data perhaps; leave it off then."
            if self._trial
            else ""
        )

    def _owned_params(self) -> list[int]:
        return [i for bucket in self.owned for i in self.ascent_grads.members[bucket]]

    def _owned_of(self, *per_param: Sequence) -> tuple[list, ...]:
        """Of lists with one entry per parameter, the entries of owned parameters."""
        return tuple([entries[i] for i in self._owned_params()] for entries in per_param)


def _saved_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the buffers are that a checkpoint holds: running statistics and whatever else forward may change."""
    saved = model.state_dict().keys()
    places = [name.rpartition(".") for name, _ in model.named_buffers() if name in saved]
    return [(model.get_submodule(path), name) for path, _, name in places]
