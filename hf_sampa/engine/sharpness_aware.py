"""What SAM and SAMPa have in common: the recipe of a step, the numbers it reports, and what it leaves in ``.grad``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import Exchange, Role, check_rest_alike, here, is_spread, shards_of
from ..functional import inner, norms, perturb, ratio, real
from ..variants import Moment, Norms, Recipe
from .buckets import Buckets
from .gradients import TRIAL_STEPS, Backward, Gradients
from .passes import Batch, Found, Pass, StepReport
from .per_sample import SampleView
from .placement import Placement
from .trained import Trained


logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20
WIDE = 1e15  # norms that leave little room below the end of single precision for squares, sums and what a recipe multiplies
NOT_TAKEN = float("nan")  # a number that a step does not have


class SharpnessAware(Gradients):
    """A sharpness-aware step on any base optimizer: a timing (`SAM`, `SAMPa`), a recipe and a placement, which know nothing of one another.

    Args:
        model: what is trained.
        base_optimizer: holds what is trained, takes the step afterwards.
        exchange: connects the processes.
        rho: radius of the perturbation, >= 0.
        recipe: what the step is made of; by default SAM's.
        placement: where the numbers live; by default whole in every process.
        samples: the single samples of a batch, for recipes that see them.
        max_steps: T,
        num_samples: in the dataset, and
        seed: of the run, for parts of the recipe that want to know.
        others: modules with a part in the loss besides the model, by name.
        kwargs: see `Gradients`.

    Attributes:
        rehearsing: whether the passes in progress are those of `rehearse`, which belong to no step.
        starting: whether the pass in progress is that for g_0.
        plain: whether the step in progress is one of the base optimizer alone.
    """

    rehearsing = False
    starting = False
    plain = False

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Optimizer,
        exchange: Exchange,
        *,
        rho: float,
        recipe: Recipe | None = None,
        placement: type[Placement] = Placement,
        samples: SampleView | None = None,
        max_steps: int = 1,
        num_samples: int = 0,
        seed: int = 0,
        others: Mapping[str, nn.Module] | None = None,
        **kwargs,
    ):
        super().__init__(model, Trained(base_optimizer, model, others), exchange, others=others, **kwargs)
        self.base_optimizer, self.rho = base_optimizer, rho
        self.recipe, self.max_steps, self.num_samples, self.seed = recipe or Recipe(), max_steps, num_samples, seed
        self.samples = samples
        if samples:
            samples.in_step = self.weights.sharded
        self.recipe.bind(model, self.names, self.params)
        if self.weights.sharded:
            self.recipe.check_shards(self.weights.count)
        self.roles = exchange.mesh.roles
        self.placement = placement(self)
        self.reached: set[int] = set()  # parameters of which G_t has a part, on whichever process
        self.skipped_steps = self.skipped_in_a_row = 0
        self.wide = False  # whether G_t may be so large that single precision does not hold its norm
        self._kept: tuple[int, Sequence[bool] | None] = (-1, None)

    def begin_alike(self) -> None:
        """Give all processes the weights, trained or not, and buffers of rank 0; of sharded ones those of the first with the same shard. A collective."""
        self.weights.settle()
        tensors = [*self.params, *self.forward_state.tensors().values()]
        self.exchange.broadcast([each for each in tensors if not is_spread(each)])
        spread = [each for each in tensors if is_spread(each)]
        if shards := shards_of(spread, self.exchange.mesh):
            self.exchange.broadcast_shards([here(each) for each in spread], shards.count)
        self._check_finite()

    def _check_finite(self) -> None:
        for name, own in zip(self.names, self.weights.here(), strict=True):
            if not own.isfinite().all():
                raise ValueError(
                    f"model: expected finite weights, got some in {name!r} that are not, as a run leaves them that diverged or, with "
                    "shard_optimizer, ended with an exception. Load the model anew, or go on from a checkpoint."
                )

    def check_state(self) -> None:
        """Raise ValueError, on all ranks, where optimizer state is missing that another process has. A collective.

        So it is after a run that shared the optimizer, if another one, or one with other frozen layers, goes on with it.
        """
        has = torch.tensor([bool(self.base_optimizer.state.get(param)) for param in self.params])
        known = self.exchange.gather(has.long().to(self.params[0].device)).cpu().any(dim=0)
        own = self.placement.updated
        whole = torch.equal(has[own], known[own])
        if not self.exchange.gather(torch.tensor([whole]).long().to(self.params[0].device)).all():
            raise ValueError(
                "Expected every process to hold the optimizer state of the parameters that it updates, but some of it is "
                "in another process, where a run with shard_optimizer=True left it. Resume from a checkpoint of that run, or begin with a "
                "new optimizer: trainer.optimizer = trainer.lr_scheduler = None. (Layers frozen or unfrozen since move the parts, too.)"
            )
        self.placement.drop_foreign_state()

    def settings(self) -> dict[str, Any]:
        groups = enumerate(self.base_optimizer.param_groups)
        # Reading a tensor would make the host wait for its device.
        of_groups = {
            f"{name} of optimizer group {i}": value
            for i, group in groups
            for name, value in group.items()
            if isinstance(value, bool | int | float | tuple) and not name.startswith("_")
        }
        return {"rho": self.rho, **of_groups}

    def check_alike(self) -> None:
        """Raise RuntimeError, on all ranks, where they do not hold the same weights, trained or not, in the same modules. A collective."""
        self._gather(torch.zeros(0, dtype=torch.int64, device=self.params[0].device))
        if self.exchange.mesh.world_size > 1:
            check_rest_alike(self.exchange, self.forward_state.fingerprints())

    def rehearse(self, batch: Batch, backward: Backward) -> list[tuple[float, float]]:
        """Loss, and norm of the gradient, of `batch` at x_t, found twice, with a pass at other weights in between.

        The two are equal where a pass leaves nothing behind. Leaves nothing behind itself; where the model moves more than could be
        copied, it ends after the first pass and returns nothing. To be called while no g_t is carried, whose place it takes.
        Raises ValueError where a pass changes the weights that it is at.
        """
        self.weights.settle()
        self.reported, self.rehearsing = None, True
        run = partial(self.gradient, Role.LOOKAHEAD, batch, backward, self.perturbed_grads, local=True)
        with self.forward_state.kept(rehearsed=True) as not_undone:
            first = run()
            self._rehearse_elsewhere(run)
        if not not_undone:
            with self.forward_state.kept():
                again = run()
        self.rehearsing = False
        self.placement.keep_landed(self.perturbed_grads)
        for param in self.params:
            param.grad = None
        return [] if not_undone else [(each.loss.item(), each.norm.item()) for each in (first, again)]

    def _rehearse_elsewhere(self, run: Callable[[], Found]) -> None:
        """Far away, and where few models overflow: at half of x_t."""
        torch._foreach_copy_(self.ascent_grads.views, [param.detach() for param in self.weights.here()])
        torch._foreach_mul_(self.ascent_grads.flats, 0.5)
        try:
            with self.displaced(self.ascent_grads) as x, self.forward_state.kept(rehearsed=True):
                versions = [param._version for param in self.weights.here()]
                run()
                now = self.weights.here()
                changed = [name for name, *pair in zip(self.names, now, x, strict=True) if _is_not_half(*pair)]
                written = [param._version for param in now] != versions
        except (RuntimeError, ValueError, ArithmeticError, AssertionError, LookupError, TypeError, StopIteration):
            with self.forward_state.kept(rehearsed=True):
                run()  # these weights are none that the model can be at
            return
        if changed:
            raise ValueError(
                f"Expected a pass to leave trained weights alone, but forward, compute_loss or training_step changed {changed[0]!r}. "
                "Within a step the weights are displaced, so that the change would be lost. Change them in a callback, as "
                "on_step_end or on_step_begin."
            )
        if written:
            logger.warning(
                "A pass writes to trained weights, if only what they hold already. Within a step they are displaced: a change there, as "
                "of a clamp, would be lost. Make such changes in a callback, as on_step_end."
            )

    def forget_last(self) -> None:
        """Before a step: let go of the last one's gradient, which the optimizer is done with."""
        for param in self.params:
            param.grad = None
        for bucket in range(len(self.perturbed_grads.members)):
            if self._lets_go and self.perturbed_grads.has_few(bucket):
                self.perturbed_grads.release(bucket)

    # ---- The recipe ----

    def gradient(self, role: Role, batch: Batch, *args: Any, **kwargs: Any) -> Found:
        """As in `Gradients`, of what layers with adapters compute by the recipe."""
        adapters = self.recipe.adapters
        adds = adapters.adds and not self.plain
        with adapters.adding(self.rho, self.now(batch)) if adds else nullcontext():
            return super().gradient(role, batch, *args, **kwargs)

    def now(self, batch: Batch) -> Moment:
        """Where the run is at `batch`, or at a micro-batch of it."""
        group = self.base_optimizer.param_groups[0]
        peak = group.get("initial_lr", group["lr"])
        fraction = float(group["lr"] / peak) if peak else 0.0
        return Moment(
            batch.update,
            batch.epoch,
            self.max_steps,
            self.num_samples,
            fraction,
            self.seed,
            norms=self.weights.norms,
            adam_denominators=self._adam_denominators,
        )

    def _adam_denominators(self) -> Iterator[Tensor | None]:
        """sqrt(v / (1 - beta_2^t)) + eps of each parameter, like what a recipe is given of it; None before its first step."""
        optimizer = self.base_optimizer
        group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
        for param in self.params:
            state, group = optimizer.state.get(param), group_of[param]
            if not state:
                yield None
                continue
            if not {"exp_avg_sq", "step"} <= state.keys():
                raise ValueError(
                    f"variant: expected an optimizer with Adam's second moments, under torch's name exp_avg_sq, got {type(optimizer).__name__}. "
                    "Set optim='adamw_torch', or take another variant."
                )
            (v,) = real([here(state["exp_avg_sq"])])
            yield (v / (1 - group["betas"][1] ** state["step"])).sqrt_().add_(group["eps"])

    def _keeps(self, now: Moment) -> Sequence[bool] | None:
        """What the mask keeps in this step, whatever it observes meanwhile."""
        if self._kept[0] != now.step:
            self._kept = now.step, self.recipe.mask.keeps(now)
        return self._kept[1]

    def learn(self, now: Moment) -> None:
        """Show squared gradients of single samples to a mask that asks for them."""
        mask = self.recipe.mask
        if not mask.wants_fisher(now):
            return
        places = torch.randint(self.num_samples, (mask.fisher_samples,), generator=now.generator("fisher")).tolist()
        # Squares are soon out of the range of single precision.
        fisher = [torch.zeros_like(param, dtype=torch.float64) for param in real(self.params)]
        for place in places:
            grads = torch.autograd.grad(self.samples.loss_at(place, now), self.params, allow_unused=True)
            for total, grad in zip(fisher, grads, strict=True):
                if grad is not None:
                    total.add_(real([grad])[0].double().square())
        mask.learn(fisher, now)

    @torch.no_grad()
    def ascend(
        self, grads: Buckets, norm: float | Tensor | None, out: Buckets, now: Moment, own: Sequence[int] | None = None
    ) -> None:
        """Write x~_t = x_t + eps_t into `out`, which may be `grads`: g_t, whole, of norm `norm`, if any; of all parameters or of the `own`."""
        recipe, keeps = self.recipe, self._keeps(now)
        own = range(len(self.params)) if own is None else own
        for bucket in {out.bucket_of[i] for i in own}:
            out.ensure(bucket)  # a pass that failed leaves large ones released
        weights = self.weights.here()
        x, g, moved = (real([each[i] for i in own]) for each in (weights, grads.views, out.views))
        if not recipe.plain and out is not grads and norm is not None:
            torch._foreach_copy_(moved, g)
            g = moved
        left_out = [] if keeps is None else [each for each, kept in zip(g, keeps, strict=True) if not kept]
        if left_out:
            torch._foreach_zero_(left_out)
            norm = now.norm(g)
        divisor = recipe.direction(g, x, norm, now)
        thinned = recipe.mask.thin(g, now)
        rho = self.rho * recipe.direction.radius(now) * recipe.mask.scale
        exact = recipe.direction.unit and not thinned
        self._displacement = rho if exact else ratio(rho * now.norm(g), divisor)
        perturb(x, g, rho, divisor, out=moved)

    @torch.no_grad()
    def _mix(self, ascent: Pass | None, perturbed: Pass, g: Buckets | None, now: Moment) -> list[bool]:
        """Turn what landed of g~_t into what the recipe makes of it and g_t; returns which parameters it has a part of."""
        recipe, g_tilde = self.recipe, real([self.perturbed_grads.views[i] for i in self.placement.held])
        kept = real([g.views[i] for i in self.placement.held]) if recipe.mixing.needs_ascent else []
        lengths = Norms(ascent.norm if ascent else NOT_TAKEN, perturbed.norm)
        if recipe.mixing.reads_dot:
            lengths = replace(lengths, dot=self._dot(g, self.perturbed_grads, lengths))
        if Role.PERTURBED in self.roles:  # where the direction was made
            recipe.direction.observe(g_tilde)
        recipe.when.observe(kept, g_tilde, now)
        if g_tilde:  # of few parameters nothing may land here
            recipe.mixing(g_tilde, kept, lengths, now)
        return recipe.mixing.reached(ascent.used if ascent else perturbed.used, perturbed.used)

    def _dot(self, g: Buckets, g_tilde: Buckets, lengths: Norms) -> float:
        """<g_t, g~_t> over all parameters, wherever they are, added up in double precision."""
        left, right = ([each.views[i] for i in self.placement.updated] for each in (g, g_tilde))
        own = inner(real(left), real(right), (lengths.ascent, lengths.perturbed)).unbind() if left else []
        return self.placement.of_all(own).sum().item()

    def recipe_state(self) -> dict[str, Any]:
        """What the parts of the recipe remember; of sharded weights a collective."""
        return _for_lists(self.recipe.state_dict(), self.weights.whole)

    def load_recipe_state(self, state: dict[str, Any]) -> None:
        """Go on where `recipe_state` was taken."""
        self.recipe.load_state_dict(_for_lists(state, self.weights.parts), self.params)

    # ---- A step without sharpness ----

    def plain_step(self, batch: Batch, backward: Backward) -> StepReport:
        """One step of the base optimizer alone, as before the first sharpness-aware one: leaves grad f(x_t; B_t) in ``.grad``."""
        self.forget_last()
        self.placement.gather_weights()
        self.plain, self.reported = True, Role.LOOKAHEAD
        try:
            found = self._plain_gradient(batch, backward)
        finally:
            self.plain = False
        return self._finish(None, None, found, found.used, skipped=not found.finite)

    def _plain_gradient(self, batch: Batch, backward: Backward) -> Pass:
        """grad f(x_t; B_t), into what G_t is made in."""
        raise NotImplementedError

    # ---- The end of a step ----

    def _finish(
        self, ascent: Pass | None, perturbed: Pass | None, reported: Pass, used: Sequence[bool], skipped: bool
    ) -> StepReport:
        """Put G_t (or, where the step is skipped, nothing) into ``.grad``. None: that gradient was not taken."""
        self.wide = max(each.norm for each in (ascent, perturbed, reported) if each) > WIDE
        skipped = skipped or (self.wide and self._overflows())
        if self._trial and perturbed:  # otherwise nothing was displaced that backward may read
            self._trial = TRIAL_STEPS if skipped else self._trial - 1
        if not self._trial and not self.first_pass:
            self._recorder.group(self.perturbed_grads)
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
        own = self.reached.intersection(self.placement.updated)
        # Tensors of their own, by which `Buckets.unshare` knows who keeps them.
        self.weights.set_grads({i: self.perturbed_grads.views[i].detach() for i in own})
        same_samples = not (self.recipe.samples.looks_again or self.recipe.samples.next_batch)
        return StepReport(
            loss=reported.loss,
            perturbed_loss=perturbed.loss if perturbed else NOT_TAKEN,
            sharpness=perturbed.loss - ascent.loss if perturbed and ascent and same_samples else NOT_TAKEN,
            ascent_grad_norm=ascent.norm if ascent else NOT_TAKEN,
            ascent_cosine=ratio(perturbed.dot, perturbed.norm) if perturbed else NOT_TAKEN,
            skipped=skipped,
        )

    def _overflows(self) -> bool:
        """Whether what the recipe and lambda made of finite gradients is not finite. A collective, with a host-device sync."""
        own = [self.perturbed_grads.views[i] for i in self.placement.updated]
        return not self.placement.of_all(norms(own).unbind() if own else []).isfinite().all()

    def grad_norm(self) -> Tensor:
        """||G_t|| of the model, from ``.grad``. A collective, where the optimizer is shared."""
        return self.placement.grad_norm(self.reached, self.wide)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip G_t of the model in ``.grad`` by its norm, which is returned. As `grad_norm`."""
        return self.placement.clip_grad_norm_(self.reached, max_norm, self.wide)

    @property
    def clips_itself(self) -> bool:
        """Whether what torch finds in ``.grad`` may not be the norm of G_t, but that of a part, or infinity."""
        return self.placement.shared or self.weights.sharded or self.wide

    def late_reader(self) -> str:
        """What else may be behind a bad gradient in the first steps; empty afterwards."""
        return (
            " In the first steps a weight becomes NaN once its gradient is complete: if the run is well with "
            "overlap_exchange=False, the model's backward reads a weight after that, as weight.data perhaps; leave it off then."
            if self._trial
            else ""
        )


@torch.no_grad()
def _is_not_half(half: Tensor, own: Tensor) -> bool:
    """Whether `half` is something else than half of `own`; what was changed and put back may be so to rounding."""
    largest = partial(torch.linalg.vector_norm, ord=float("inf"))
    return half.numel() > 0 and bool(largest(half.sub(own, alpha=0.5)) > 1e-6 + 1e-4 * largest(half))


def _for_lists(
    state: dict[str, dict[str, Any]], change: Callable[[list[Tensor]], list[Tensor]]
) -> dict[str, dict[str, Any]]:
    """State of parts, its lists of tensors like weights changed."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, list) and value and isinstance(value[0], Tensor) else value

    return {part: {name: changed(value) for name, value in own.items()} for part, own in state.items()}
