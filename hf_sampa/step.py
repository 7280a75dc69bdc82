"""The step in `transformers.Trainer`: what happens between a batch and ``.grad``, and how that is clipped."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.trainer_utils import has_length

from .checks import check_settings_kept, check_trainable
from .data import INDICES, MicroBatch, UpdateBatch
from .distributed import Role, check_repeatable
from .engine import (
    SAM,
    Placement,
    SAMPa,
    SampleView,
    Shared,
    SharedGradScaler,
    check_classes,
    check_separable,
    logits_of,
    recipe_loss,
)
from .monitoring import show
from .state import Collected, OwnGenerator, derive_seed, other_modules, seed_own, seeded, stood_in
from .variants import Moment


logger = get_logger(__name__)

# Settings that decide how a run is put together. Others, rho and lambda among them, may change while it goes on.
FIXED = (
    "method",
    "variant",
    "variant_args",
    "shard_optimizer",
    "overlap_exchange",
    "gradient_accumulation_steps",
    "seed",
)


def _is_zero(share: float | torch.Tensor | None) -> bool:
    """Whether no label of a micro-batch counts."""
    return isinstance(share, float) and not share


class StepMixin:
    """The part of `SAMPaMixin` that runs the engine.

    The loop calls ``training_step`` for every micro-batch: it is given `_step`, which runs the whole step with the last of
    them. The class's own ``training_step``, Trainer's or one that somebody wrote, is what a pass does with a micro-batch.
    """

    _in_pass: tuple[MicroBatch, Role] | None = None  # what a loss is computed for
    _pass_step: Callable[..., torch.Tensor] | None = None  # the class's own training_step, while the loop runs
    _clock_hook: Any = None
    _said: list[tuple[tuple, dict]] | None = None  # what was logged during passes that are reported
    _rehearsed = False  # whether the run's first batch has been through `_rehearse`
    _step_state: str = "between"  # or "in passes", or "in update", from G_t to the end of the step

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = SharedGradScaler(self.accelerator.scaler, self.accelerator.device.type)

    # ---- The engine ----

    def _engine(self, max_steps: int) -> SAMPa | SAM:
        # A copy, so that a recipe of one's own begins every run as it was made.
        recipe = copy.deepcopy(self._recipe) if self._recipe else self.args.recipe()
        common = {
            "rho": self.args.rho,
            "others": other_modules(self, self.model),
            "overlap": self.args.overlap_exchange,
            "partial_backward": not self.args.torch_compile,
            "recipe": recipe,
            "samples": SampleView(self._exchange, partial(self._look, self.model_wrapped), self._weigh, self._loss_at),
            "max_steps": max_steps,
            "num_samples": len(self.train_dataset) if has_length(self.train_dataset) else 0,
            "seed": self.args.seed,
        }
        if self.accelerator.scaler is not None:
            common["unscale"] = self.accelerator.scaler.inverse_scale
        if self.args.shard_optimizer:
            check_separable(self.optimizer.optimizer)  # on one process, too, so that what starts there starts on two
        common["placement"] = Shared if self.args.shard_optimizer and self.args.world_size > 1 else Placement
        if self.args.method == "sam":
            return SAM(self.model, self.optimizer.optimizer, self._exchange, **common)
        return SAMPa(
            self.model,
            self.optimizer.optimizer,
            self._exchange,
            lmbda=self.args.lmbda,
            clip_scale=self._clip_scale,
            **common,
        )

    def _prepare_steps(self, max_steps: int) -> None:
        """Build what the steps of a run need."""
        self.sampa = self._engine(max_steps)
        self._collected = Collected(self, ("transformers.", "hf_sampa."), self._exchange)
        self.sampa.digest_of_rest, self.sampa.share_rest = self._digest_of_rest, self._share_what_was_collected
        if self._clock_hook is not None:
            self._clock_hook.remove()
            self._pass_hook.remove()
        self._clock.seconds, self._clock.steps = 0.0, 0
        self._clock_hook = self.optimizer.optimizer.register_step_post_hook(self._clock.stop)
        self._pass_hook = self.optimizer.optimizer.register_step_pre_hook(self._refuse_update)
        self._fixed = {name: copy.deepcopy(getattr(self.args, name)) for name in FIXED}
        self._step_state, self._said, self._rehearsed = "between", [], False

    def _digest_of_rest(self) -> int:
        return self._collected.digest() + len(self._said)

    def _clip_scale(self, norm: float) -> float:
        """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by."""
        return min(1.0, self.args.max_grad_norm / (norm + 1e-6)) if self.args.max_grad_norm > 0 else 1.0

    # ---- A step ----

    def _step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """What the loop calls for every micro-batch; returns the loss that is logged, of the whole update batch."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self._clock.start()
        check_trainable(self.model, self.optimizer.optimizer, self.sampa.params)
        self._follow_settings()
        # Before the weights are displaced: schedule-free optimizers move them when they change modes.
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self._step_state = "in passes"
        if not self._rehearsed:
            self._rehearse(model)
        report = self._run_engine(partial(self._micro_gradient, model))
        self._step_state = "in update"
        show(self, report)
        if report.skipped:
            # Overflows of fp16 are usual in the first steps.
            hint = self.sampa.late_reader() if self.accelerator.scaler is None else ""
            logger.warning(
                f"Step {self.state.global_step + 1} had a gradient that is not finite and is skipped; "
                f"{self.sampa.skipped_steps} step(s) so far.{hint}"
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.overflow = report.skipped
        self._means.add(report, self.sampa.skipped_steps)
        # Filled by the device: a copy from the host would wait for it.
        return torch.full((), report.loss, dtype=torch.float32, device=self.args.device)

    def _run_engine(self, gradient: Callable[..., torch.Tensor]):
        batch, next_batch = self._batch, self._stream.peek()
        self._weigh(batch)
        if next_batch is not None and self.sampa.reads_next_batch:
            self._weigh(next_batch)
        report = self.sampa.step(batch, next_batch, gradient)
        self._share_what_was_collected()
        return report

    def _rehearse(self, model) -> None:
        """Find, before the first step of a run, what passes leave behind unseen or do otherwise on one process. A collective."""
        if getattr(self.sampa, "ascent", None) is None:  # a run that goes on was rehearsed when it began
            self._weigh(self._batch)
            some = next((each for each in self._batch if not _is_zero(each.share)), self._batch.micro_batches[0])
            part = replace(self._batch, micro_batches=[some])
            with self._collected.rehearsal():
                found = self.sampa.rehearse(part, partial(self._micro_gradient, model))
            repeats = self.args.device.type == "cpu" and not self.args.torch_compile
            check_repeatable(self._exchange, found, part.fingerprint, exact=repeats)
        self._rehearsed = True

    def _follow_settings(self) -> None:
        """Take over what a callback may have changed, and refuse what cannot be followed."""
        check_settings_kept(self.args, self._fixed)
        if (self.args.rho, self.args.lmbda) != (self.sampa.rho, getattr(self.sampa, "lmbda", self.args.lmbda)):
            self.args.check_settings()
            self.sampa.rho = self.args.rho
            if isinstance(self.sampa, SAMPa):
                self.sampa.lmbda = self.args.lmbda

    def _share_what_was_collected(self) -> None:
        """What the reported passes left on the trainer, and what they logged, is the same on both halves of a pair."""
        if self.sampa.rest_differs:
            mesh = self._exchange.mesh
            of_all = self._exchange.share_objects((self._collected.state_dict(), self._said))
            if mesh.roles[0] is not Role.LOOKAHEAD:
                state, self._said = of_all[mesh.peer]
                self._collected.load_state_dict(state)
        said, self._said = self._said, []
        for given, named in said:
            super().log(*given, **named)

    def lookahead_error(self) -> tuple[float, float] | None:
        """As in `SAMPa.lookahead_error`, of the batch that is about to be trained on; None for sequential methods."""
        if not isinstance(self.sampa, SAMPa):
            return None
        self._weigh(self._batch)
        return self.sampa.lookahead_error(self._batch, partial(self._micro_gradient, self.model_wrapped))

    def _weigh(self, batch: UpdateBatch) -> None:
        """Set every micro-batch's share, so that micro-batches and replicas add up to one large batch's mean.

        Upstream divides by `num_items_in_batch` or by the accumulation steps, depending on whether the model says it
        accepts the former; BERT's heads say so and ignore it (transformers #47688). Here every micro-batch is given its
        own count, so that every loss is its mean, and is weighed by that count.
        """
        if batch.micro_batches[0].share is not None:
            return
        counts = []
        for micro_batch in batch:
            with self._exchange.role_world.lent():
                num_items = self._get_num_items_in_batch([micro_batch.inputs], torch.device("cpu"))
            micro_batch.num_items = None if num_items is None else num_items.to(self.args.device)
            counts.append(micro_batch.count_items() if num_items is None else float(num_items))
        total = self._exchange.sum_within_role(sum(counts))
        for micro_batch, count in zip(batch, counts, strict=True):
            if isinstance(total, torch.Tensor):
                # Stays on the device: reading it would make the host wait. No micro-batch with a count has total 0.
                micro_batch.share = (count * self._exchange.mesh.num_replicas / total).float() if count else 0.0
            else:
                micro_batch.share = count / total if count else 0.0

    # ---- A pass ----

    @contextmanager
    def aside(self, counted: bool = False) -> Iterator[None]:
        """Around code that computes a loss: its world is its role's, and unless it is `counted`, it leaves nothing on the trainer."""
        # Numbers of modules go with their buffers, which g_0's pass moves.
        collected = self._collected.counted() if counted else self._collected.aside(not self.sampa.starting)
        with self._exchange.role_world.lent(), collected:
            yield

    def _micro_gradient(self, model, micro_batch: MicroBatch, role: Role) -> torch.Tensor:
        """Forward and backward of one micro-batch, on generators that belong to it; its share of the batch's loss."""
        if _is_zero(micro_batch.share):
            return torch.zeros((), device=self.args.device)  # no label counts, and the mean over none is not a number
        micro_batch.logits = None
        with self._pass(micro_batch, role), self.aside(counted=role is self.sampa.reported):
            with self._own_randomness(micro_batch):
                loss = self._pass_step(model, self._inputs_of(micro_batch), micro_batch.num_items)
        self._check_gradient()
        if self.sampa.rehearsing:  # teachers that the first pass made
            self.sampa.forward_state.modules |= other_modules(self, self.model)
        if not self._needs_logits:
            return loss
        if micro_batch.logits is None:
            raise ValueError(
                "variant: expected a compute_loss that calls super().compute_loss(), which sees the logits of single samples "
                f"for the variant, but that of {type(self).__name__} does not. Put it into a Trainer below SAMPaMixin."
            )
        return micro_batch.loss * micro_batch.share  # what is reported is the trainer's own loss

    @property
    def _needs_logits(self) -> bool:
        """Whether the recipe makes something of the trainer's own loss."""
        return self.sampa.recipe.reads_logits and not self.sampa.rehearsing

    @contextmanager
    def _pass(self, micro_batch: MicroBatch, role: Role) -> Iterator[None]:
        """What `training_step` and `compute_loss` find on the trainer during a pass."""
        before = self.loss_is_scaled_for_ga
        # Every loss is the mean over one micro-batch here, which Trainer's training_step divides by this, whatever it is of.
        self.loss_is_scaled_for_ga, self.current_gradient_accumulation_steps = False, 1 / micro_batch.share
        self._in_pass = (micro_batch, role)
        hook = register_optimizer_step_post_hook(self._refuse_other_optimizer)
        try:
            with stood_in(self.model, "generate", self._refuse_generation) if self._generates else nullcontext():
                yield
        finally:
            hook.remove()
            self._in_pass, self.loss_is_scaled_for_ga = None, before

    @property
    def _generates(self) -> bool:
        return self.sampa.first_pass and hasattr(self.model, "generate")

    def _refuse_generation(self, *args, **kwargs):
        raise ValueError(
            "Expected a batch that is there before the step, but the model was asked to generate within it: what it generates at "
            "the look-ahead weights and at the perturbed ones would differ, while both gradients of a step have to be of the same "
            "samples. Generate the data before training, or in a callback between steps."
        )

    def _refuse_update(self, *_) -> None:
        if self._in_pass is not None:
            raise ValueError(
                "training_step: expected a forward and a backward pass only, but the optimizer's step was called within it, "
                "while the weights are displaced. Leave steps and zeroing gradients to the loop."
            )

    def _refuse_other_optimizer(self, optimizer: torch.optim.Optimizer, *_) -> None:
        if any(optimizer.state.values()):
            raise ValueError(
                f"training_step: expected a forward and a backward pass only, but a step of {type(optimizer).__name__} was taken "
                "within it, which keeps state from step to step (moments, momentum) that several passes of one update batch would "
                "move. Take it in a callback, as on_step_end, or with an optimizer that keeps none, as SGD without momentum."
            )

    def _inputs_of(self, micro_batch: MicroBatch) -> Any:
        """The inputs, as a copy on the training device: what a pass does to them the next one does not see."""
        non_blocking = self.accelerator.non_blocking
        return send_to_device(micro_batch.own_inputs(self.args.device), self.args.device, non_blocking=non_blocking)

    def _check_gradient(self) -> None:
        """Refuse, in the first pass of a run, a training_step that leaves no gradient."""
        if self.sampa.first_pass and all(param.grad is None for param in self.sampa.params):
            raise ValueError(
                f"training_step: expected a forward and a backward pass that leaves a gradient, but after that of "
                f"{type(self).__name__} no trained parameter has one. Call self.accelerator.backward(loss) in it, or "
                "super().training_step(...); a step of the optimizer and zeroing gradients are the loop's."
            )

    def _own_randomness(self, micro_batch: MicroBatch):
        seed = derive_seed(self.args.seed, micro_batch.update, micro_batch.position, self._exchange.mesh.replica)
        modules = (part for each in self.sampa.forward_state.modules.values() for part in each.modules())
        for holder in (self, *modules):  # generators of one's own, for mixup perhaps
            for value in vars(holder).values():
                if isinstance(value, OwnGenerator):
                    seed_own(seed, value)
        return seeded(seed, self.args.device)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self._in_pass is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        micro_batch, role = self._in_pass
        with self._undivided():
            if not self._needs_logits:
                return super().compute_loss(model, inputs, *args, **kwargs)
            given = inspect.signature(super().compute_loss).bind(model, inputs, *args, **kwargs).arguments
            wanted = given.get("return_outputs", False)
            loss, outputs = super().compute_loss(**{**given, "return_outputs": True})
        now, ascent = self.sampa.now(micro_batch), role is Role.LOOKAHEAD
        loss = recipe_loss(self.sampa.recipe.loss, loss, outputs, micro_batch, ascent, now)
        return (loss, outputs) if wanted else loss

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        """Losses that divide parts of themselves by the accumulation steps are divided as a whole afterwards."""
        before, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        try:
            yield
        finally:
            self.current_gradient_accumulation_steps = before

    @torch.no_grad()
    def _look(self, model, micro_batch: MicroBatch, evaluating: bool) -> None:
        """Forward of one micro-batch, as in its passes or in evaluation mode, for its logits."""
        model.train(not evaluating)
        with self.aside(), self._own_randomness(micro_batch), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(self._inputs_of(micro_batch))
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        model.train()
        logits = logits_of(outputs)
        check_classes(logits, micro_batch.inputs.get("labels"))
        micro_batch.logits = logits

    def _loss_at(self, place: int, now: Moment) -> torch.Tensor:
        """Loss of the sample at `place` of the dataset, in evaluation mode, with a graph."""
        inputs = self._loader.collate_fn(self._loader.dataset.__getitems__([(now.epoch, place)]))
        inputs.pop(INDICES, None)
        self.model.eval()
        with self.aside(), self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(inputs))
        self.model.train()
        return loss

    def log(self, logs, *args, **kwargs):
        if self._in_pass is None:
            super().log(logs, *args, **kwargs)
        elif self._in_pass[1] is self.sampa.reported:
            # Once the step is through, by all processes: the one that shows logs may be another.
            self._said.append(((dict(logs), *args), kwargs))

    # ---- After the passes ----

    def _clip_grad_norm(self, model):
        if self.sampa is not None and self.sampa.placement.shared:
            return self.sampa.placement.clip_grad_norm_(self.sampa.reached, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and self.sampa.placement.shared:
            grad_norm = self.sampa.placement.grad_norm(self.sampa.reached)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return float("nan") if self.sampa.skipped_in_a_row else norm
