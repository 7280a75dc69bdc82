"""A micro-batch in `transformers.Trainer`: forward and backward by the class's own ``training_step``, at whatever weights there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch.optim.optimizer import register_optimizer_step_post_hook

from .compat import divided_by
from .data import INDICES, MicroBatch, UpdateBatch
from .distributed import Role
from .engine import check_classes, logits_of, recipe_loss
from .state import OwnGenerator, derive_seed, generators_in, other_modules, seed_own, seeded, stood_in
from .variants import Moment


if TYPE_CHECKING:
    from .steps import Steps


# Attributes of a trainer that a pass sets for itself.
OF_A_PASS = (
    "current_gradient_accumulation_steps",
    "loss_is_scaled_for_ga",
    "model_accepts_loss_kwargs",
    "compute_loss_func",
    "compute_loss",
)


class MicroBatches:
    """What a pass does with a micro-batch, and what it weighs.

    Args:
        steps: whose passes they are.

    Attributes:
        training_step: the class's own.
        in_pass: the micro-batch and the role that a loss is computed for; None outside of a pass.
        said: what was logged during passes that are reported.
    """

    def __init__(self, steps: Steps):
        self.steps, self.trainer, self.exchange = steps, steps.trainer, steps.run.exchange
        self.training_step: Callable[..., torch.Tensor] | None = None
        self.in_pass: tuple[MicroBatch, Role] | None = None
        self.said: list[tuple[tuple, dict]] = []

    # ---- What it weighs ----

    def weigh(self, batch: UpdateBatch) -> None:
        """Set every micro-batch's share, so that micro-batches and replicas add up to one large batch's mean.

        Upstream divides by `num_items_in_batch` or by the accumulation steps, depending on whether the model says it
        accepts the former; BERT's heads say so and ignore it (transformers #47688). Here every micro-batch is given its
        own count, so that every loss is its mean, and is weighed by that count.
        """
        if batch.micro_batches[0].share is not None:
            return
        counts, device = [], self.trainer.args.device
        for micro_batch in batch:
            with self.exchange.role_world.lent():
                num_items = self.trainer._get_num_items_in_batch([micro_batch.inputs], torch.device("cpu"))
            micro_batch.num_items = None if num_items is None else num_items.to(device, non_blocking=True)
            counts.append(micro_batch.count_items() if num_items is None else float(num_items))
        total = self.exchange.sum_within_role(sum(counts))
        for micro_batch, count in zip(batch, counts, strict=True):
            if isinstance(total, torch.Tensor):
                # Stays on the device: reading it would make the host wait. No micro-batch with a count has total 0.
                micro_batch.share = (count * self.exchange.mesh.num_replicas / total).float() if count else 0.0
            else:
                micro_batch.share = count / total if count else 0.0

    # ---- Forward and backward ----

    def backward(self, model, micro_batch: MicroBatch, role: Role) -> torch.Tensor:
        """Forward and backward of one micro-batch, on generators that belong to it; its share of the batch's loss."""
        engine, trainer = self.steps.engine, self.trainer
        # The mean over no label is not a number. A pass of a sharded model is one of all processes that hold it.
        if not micro_batch.counts and not engine.weights.sharded:
            return torch.zeros((), device=trainer.args.device)
        micro_batch.logits = None
        with self._pass(micro_batch, role), self.aside(counted=role is engine.reported):
            with self._own_randomness(micro_batch):
                loss = self.training_step(model, self._inputs_of(micro_batch), micro_batch.num_items)
        self._check_gradient()
        if engine.rehearsing:  # teachers that the first pass made
            engine.forward_state.modules |= other_modules(trainer, trainer.model)
        if not self._needs_logits or not micro_batch.counts:
            return loss
        if micro_batch.logits is None:
            raise ValueError(
                "variant: expected a compute_loss that calls super().compute_loss(), which sees the logits of single samples "
                f"for the variant, but that of {type(trainer).__name__} does not. Put it into a Trainer below SAMPaMixin."
            )
        return micro_batch.loss * micro_batch.share  # what is reported is the trainer's own loss

    @contextmanager
    def aside(self, counted: bool = False) -> Iterator[None]:
        """Around code that computes a loss: its world is its role's, and unless it is `counted`, it leaves nothing on the trainer."""
        collected = self.steps.collected
        if self._at_once:
            # Each half has what it leaves on the trainer for itself.
            kept = collected.counted() if counted else nullcontext()
            with self.exchange.role_world.lent(), kept:
                yield
            return
        # Numbers of modules go with their buffers, which g_0's pass moves.
        kept = collected.counted() if counted else collected.aside(not self.steps.engine.starting)
        with self.exchange.role_world.lent(), kept:
            yield

    @property
    def _at_once(self) -> bool:
        """Whether the pass in progress is a half of two."""
        one_pass = getattr(self.steps.engine, "one_pass", None)
        return one_pass is not None and one_pass.halves.current is not None

    @property
    def _needs_logits(self) -> bool:
        """Whether the recipe makes something of the trainer's own loss."""
        engine = self.steps.engine
        return engine.recipe.reads_logits and not engine.rehearsing and not engine.plain

    @contextmanager
    def _pass(self, micro_batch: MicroBatch, role: Role) -> Iterator[None]:
        """What `training_step` and `compute_loss` find on the trainer during a pass."""
        trainer = self.trainer
        self.in_pass = (micro_batch, role)
        hook = register_optimizer_step_post_hook(_refuse_other_optimizer)
        generates = self.steps.engine.first_pass and hasattr(trainer.model, "generate")
        try:
            # Every loss is the mean over one micro-batch here.
            with (
                divided_by(trainer, 1 / (micro_batch.share or 1.0)),
                stood_in(trainer.model, "generate", _refuse_generation) if generates else nullcontext(),
            ):
                yield
        finally:
            hook.remove()
            self.in_pass = None

    def compute_loss(self, own: Callable, model, inputs, *args, **kwargs) -> Any:
        """What `own`, the class's ``compute_loss``, says in a pass, and what the recipe makes of it."""
        micro_batch, role = self.in_pass
        if not micro_batch.counts:
            with self._undivided():
                return _without_a_part(own(model, inputs, *args, **kwargs))
        with self._undivided():
            if not self._needs_logits:
                return own(model, inputs, *args, **kwargs)
            given = inspect.signature(own).bind(model, inputs, *args, **kwargs)
            if "return_outputs" in given.signature.parameters:
                wanted, given.arguments["return_outputs"] = given.arguments.get("return_outputs", False), True
                loss, outputs = own(*given.args, **given.kwargs)
            else:
                wanted = kwargs.get("return_outputs", False)
                loss, outputs = own(model, inputs, *args, **{**kwargs, "return_outputs": True})
        engine = self.steps.engine
        now, ascent = engine.now(micro_batch), role is Role.LOOKAHEAD
        loss = recipe_loss(engine.recipe.loss, loss, outputs, micro_batch, ascent, now)
        return (loss, outputs) if wanted else loss

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        """Losses that divide parts of themselves by the accumulation steps are divided as a whole afterwards."""
        trainer = self.trainer
        before, trainer.current_gradient_accumulation_steps = trainer.current_gradient_accumulation_steps, 1
        try:
            yield
        finally:
            trainer.current_gradient_accumulation_steps = before

    def log(self, *given, **named) -> None:
        """Keep what is logged in a pass that is reported until the step is through: the process that shows logs may be another."""
        if self.in_pass[1] is self.steps.engine.reported:
            logs, *rest = given
            self.said.append(((dict(logs), *rest), named))

    def _inputs_of(self, micro_batch: MicroBatch) -> Any:
        """The inputs, as a copy on the training device: what a pass does to them the next one does not see."""
        device, non_blocking = self.trainer.args.device, self.trainer.accelerator.non_blocking
        return send_to_device(micro_batch.own_inputs(device), device, non_blocking=non_blocking)

    def _own_randomness(self, micro_batch: MicroBatch):
        args, replica = self.trainer.args, self.exchange.mesh.replica
        seed = derive_seed(args.seed, micro_batch.update, micro_batch.position, replica)
        for generator in self.own_generators():
            seed_own(seed, generator)
        return seeded(seed, args.device)

    def own_generators(self) -> list[OwnGenerator]:
        """Those that the trainer and modules keep, for mixup perhaps."""
        modules = (part for each in self.steps.engine.forward_state.modules.values() for part in each.modules())
        return generators_in((self.trainer, *modules))

    # ---- Forward alone, for variants that look at single samples ----

    @torch.no_grad()
    def look(self, model, micro_batch: MicroBatch, evaluating: bool) -> None:
        """Forward of one micro-batch, as in its passes or in evaluation mode, for its logits."""
        trainer = self.trainer
        model.train(not evaluating)
        with self.aside(), self._own_randomness(micro_batch), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(self._inputs_of(micro_batch))
            _, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        model.train()
        logits = logits_of(outputs)
        check_classes(logits, micro_batch.inputs.get("labels"))
        micro_batch.logits = logits

    def loss_at(self, place: int, now: Moment) -> torch.Tensor:
        """Loss of the sample at `place` of the dataset, in evaluation mode, with a graph."""
        trainer, loader = self.trainer, self.steps.run.loader
        inputs = loader.collate_fn(loader.dataset.__getitems__([(now.epoch, place)]))
        inputs.pop(INDICES, None)
        trainer.model.eval()
        with self.aside(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(inputs))
        trainer.model.train()
        return loss

    # ---- What a training_step of one's own must not do ----

    def _check_gradient(self) -> None:
        """Refuse, in the first pass of a run, a training_step that leaves no gradient."""
        engine = self.steps.engine
        # Of sharded weights there is a gradient after the last micro-batch.
        if engine.first_pass and not engine.weights.sharded and all(param.grad is None for param in engine.params):
            raise ValueError(
                f"training_step: expected a forward and a backward pass that leaves a gradient, but after that of "
                f"{type(self.trainer).__name__} no trained parameter has one. Call self.accelerator.backward(loss) in it, or "
                "super().training_step(...); a step of the optimizer and zeroing gradients are the loop's."
            )

    def refuse_update(self, *_) -> None:
        """Hook before the base optimizer's step."""
        if self.in_pass is not None:
            raise ValueError(
                "training_step: expected a forward and a backward pass only, but the optimizer's step was called within it, "
                "while the weights are displaced. Leave steps and zeroing gradients to the loop."
            )


def _without_a_part(found: Any) -> Any:
    """A loss over no label, with its outputs perhaps: it is 0, and so is its gradient."""
    if isinstance(found, tuple):
        return _without_a_part(found[0]), *found[1:]
    return torch.nan_to_num(found) * 0.0


def _refuse_generation(*args, **kwargs):
    raise ValueError(
        "Expected a batch that is there before the step, but the model was asked to generate within it: what it generates at "
        "the look-ahead weights and at the perturbed ones would differ, while both gradients of a step have to be of the same "
        "samples. Generate the data before training, or in a callback between steps."
    )


def _refuse_other_optimizer(optimizer: torch.optim.Optimizer, *_) -> None:
    if any(optimizer.state.values()):
        raise ValueError(
            f"training_step: expected a forward and a backward pass only, but a step of {type(optimizer).__name__} was taken "
            "within it, which keeps state from step to step (moments, momentum) that several passes of one update batch would "
            "move. Take it in a callback, as on_step_end, or with an optimizer that keeps none, as SGD without momentum."
        )
