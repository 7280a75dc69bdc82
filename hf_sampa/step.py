"""The step in `transformers.Trainer`: what happens between a batch and ``.grad``, and how that is clipped."""

from __future__ import annotations

import copy
from functools import partial

import torch
from accelerate.logging import get_logger
from transformers.trainer_utils import has_length

from .batches import MicroBatch, UpdateBatch
from .checks import check_trainable
from .msam import MSAM, MSAMPa, TwoLossSAMPa
from .parts import Moment
from .per_sample import SampleView, check_classes, logits_of, recipe_loss
from .precision import SharedGradScaler
from .progress import ShowsReport
from .randomness import INDICES, derive_seed, seeded
from .roles import Role
from .sam import SAM
from .sampa import SAMPa
from .sharding import ShardedSAMPa, check_separable


logger = get_logger(__name__)


class StepMixin:
    """The part of `SAMPaMixin` that runs the engine."""

    _progress: ShowsReport | None = None
    _in_pass: tuple[MicroBatch, Role] | None = None  # what `compute_loss` is called for

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = SharedGradScaler(self.accelerator.scaler, self.accelerator.device.type)

    def _engine(self, max_steps: int) -> SAMPa | SAM:
        # A copy, so that a recipe of one's own begins every run as it was made.
        recipe = copy.deepcopy(self._recipe) if self._recipe else self.args.recipe()
        sharded_batch = recipe.samples.sharded
        common = {
            "rho": self.args.rho,
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
        if self.args.method == "sam":
            return (MSAM if sharded_batch else SAM)(self.model, self.optimizer.optimizer, self._exchange, **common)
        if self.args.shard_optimizer:
            recipe.check_shared_optimizer()
            check_separable(self.optimizer.optimizer)  # on one process, too, so that what starts there starts on two
        sharded = self.args.shard_optimizer and self.args.mesh.paired
        kind = (
            TwoLossSAMPa if recipe.loss.separate else MSAMPa if sharded_batch else ShardedSAMPa if sharded else SAMPa
        )
        return kind(
            self.model,
            self.optimizer.optimizer,
            self._exchange,
            lmbda=self.args.lmbda,
            clip_scale=self._clip_scale,
            **common,
        )

    def _clip_scale(self, norm: float) -> float:
        """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by."""
        return min(1.0, self.args.max_grad_norm / (norm + 1e-6)) if self.args.max_grad_norm > 0 else 1.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self._clock.start_step()
        check_trainable(self.model, self.sampa.params)
        # Before the weights are displaced: schedule-free optimizers move them when they change modes.
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        batch, gradient = self._batch, partial(self._micro_gradient, model)
        self._weigh(batch)
        next_batch = self._stream.peek()
        if self.sampa.reads_next_batch:
            self._weigh(next_batch)
        report = self.sampa.step(batch, next_batch, gradient)
        if self._progress is not None:
            self._progress.report = report
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
            num_items = self._get_num_items_in_batch([micro_batch.inputs], torch.device("cpu"))
            micro_batch.num_items = None if num_items is None else num_items.to(self.args.device)
            counts.append(micro_batch.count_items() if num_items is None else float(num_items))
        total = self._exchange.sum_within_role(sum(counts))
        for micro_batch, count in zip(batch, counts, strict=True):
            if isinstance(total, torch.Tensor):
                # Stays on the device: reading it would make the host wait. No micro-batch with a count has total 0.
                micro_batch.share = (count * self.args.num_replicas / total).float() if count else 0.0
            else:
                micro_batch.share = count / total if count else 0.0

    def _micro_gradient(self, model, micro_batch: MicroBatch, role: Role) -> torch.Tensor:
        """Forward and backward of one micro-batch, on generators that belong to it; its share of the batch's loss."""
        if isinstance(micro_batch.share, float) and not micro_batch.share:
            return torch.zeros((), device=self.args.device)  # no label counts, and the mean over none is not a number
        # What `Trainer.training_step` divides the loss by.
        self.current_gradient_accumulation_steps = 1 / micro_batch.share
        self._in_pass, micro_batch.logits = (micro_batch, role), None
        try:
            with self._own_randomness(micro_batch):
                loss = super().training_step(model, micro_batch.inputs, micro_batch.num_items)
        finally:
            self._in_pass = None
        if not self.sampa.recipe.reads_logits:
            return loss
        if micro_batch.logits is None:
            raise ValueError(
                "variant: expected a compute_loss that calls super().compute_loss(), which sees the logits of single samples "
                f"for the variant, but that of {type(self).__name__} does not. Put it into a Trainer below SAMPaMixin."
            )
        return micro_batch.loss * micro_batch.share  # what is reported is the trainer's own loss

    def _own_randomness(self, micro_batch: MicroBatch):
        seed = derive_seed(self.args.seed, micro_batch.update, micro_batch.position, self.args.mesh.replica)
        return seeded(seed, self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._in_pass is None or not self.sampa.recipe.reads_logits:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        micro_batch, role = self._in_pass
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        now, ascent = self.sampa.now(micro_batch), role is Role.LOOKAHEAD
        loss = recipe_loss(self.sampa.recipe.loss, loss, outputs, micro_batch, ascent, now)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _look(self, model, micro_batch: MicroBatch, evaluating: bool) -> None:
        """Forward of one micro-batch, as in its passes or in evaluation mode, for its logits."""
        model.train(not evaluating)
        with self._own_randomness(micro_batch), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, self._prepare_inputs(micro_batch.inputs), return_outputs=True)
        model.train()
        logits = logits_of(outputs)
        check_classes(logits, micro_batch.inputs.get("labels"))
        micro_batch.logits = logits

    def _loss_at(self, place: int, now: Moment) -> torch.Tensor:
        """Loss of the sample at `place` of the dataset, in evaluation mode, with a graph."""
        inputs = self._loader.collate_fn(self._loader.dataset.__getitems__([(now.epoch, place)]))
        inputs.pop(INDICES, None)
        self.model.eval()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(inputs))
        self.model.train()
        return loss

    def _clip_grad_norm(self, model):
        if isinstance(self.sampa, ShardedSAMPa):
            return self.sampa.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and isinstance(self.sampa, ShardedSAMPa):
            grad_norm = self.sampa.grad_norm()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return float("nan") if self.sampa.skipped_in_a_row else norm
