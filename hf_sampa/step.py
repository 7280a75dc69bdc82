"""The step in `transformers.Trainer`: what happens between a batch and ``.grad``, and how that is clipped."""

from __future__ import annotations

from functools import partial

import torch
from accelerate.logging import get_logger

from .batches import MicroBatch, UpdateBatch
from .checks import check_trainable
from .precision import SharedGradScaler
from .randomness import derive_seed, seeded
from .roles import Role
from .sampa import SAM, SAMPa
from .sharding import ShardedSAMPa, check_separable


logger = get_logger(__name__)


class StepMixin:
    """The part of `SAMPaMixin` that runs the engine."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = SharedGradScaler(self.accelerator.scaler, self.accelerator.device.type)

    def _engine(self) -> SAMPa | SAM:
        common = {"rho": self.args.rho, "overlap": self.args.overlap_exchange}
        if self.accelerator.scaler is not None:
            common["unscale"] = self.accelerator.scaler.inverse_scale
        if self.args.method == "sam":
            return SAM(self.model, self.optimizer.optimizer, self._exchange, **common)
        if self.args.shard_optimizer:
            check_separable(self.optimizer.optimizer)  # on one process, too, so that what starts there starts on two
        sharded = self.args.shard_optimizer and self.args.mesh.paired
        return (ShardedSAMPa if sharded else SAMPa)(
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
        check_trainable(self.model, self.sampa.params)
        # Before the weights are displaced: schedule-free optimizers move them when they change modes.
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        batch, gradient = self._batch, partial(self._micro_gradient, model)
        self._weigh(batch)
        if isinstance(self.sampa, SAM):
            report = self.sampa.step(batch, gradient)
        else:
            next_batch = self._stream.peek()
            if Role.LOOKAHEAD in self.sampa.roles:
                self._weigh(next_batch)
            report = self.sampa.step(batch, next_batch, gradient)
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

    def _micro_gradient(self, model, micro_batch: MicroBatch) -> torch.Tensor:
        """Forward and backward of one micro-batch, on generators that belong to it; its share of the batch's loss."""
        if isinstance(micro_batch.share, float) and not micro_batch.share:
            return torch.zeros((), device=self.args.device)  # no label counts, and the mean over none is not a number
        # What `Trainer.training_step` divides the loss by.
        self.current_gradient_accumulation_steps = 1 / micro_batch.share
        seed = derive_seed(self.args.seed, micro_batch.update, micro_batch.position, self.args.mesh.replica)
        with seeded(seed, self.args.device):
            return super().training_step(model, micro_batch.inputs, micro_batch.num_items)

    def _clip_grad_norm(self, model):
        if isinstance(self.sampa, ShardedSAMPa):
            return self.sampa.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and isinstance(self.sampa, ShardedSAMPa):
            grad_norm = self.sampa.grad_norm()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return float("nan") if self.sampa.skipped_in_a_row else norm
