"""A callback that measures, from time to time, what is not free: how good the look-ahead is, and how sharp the loss is."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from ..data import MicroBatch
from ..distributed import units
from ..engine import Buckets
from ..functional import global_norm, perturb
from ..state import derive_seed, holding, seeded
from .curvature import hessian_product, largest_eigenvalue
from .rounding import Rounded, left_of_displacement


logger = get_logger(__name__)


class DiagnosticsCallback(TrainerCallback):
    """Logs every so many steps, of the weights x_t, and at the end, of the trained ones:

    =======================  =========================================================================================
    ``lookahead_cosine``     between grad f(y_t; B_t), which perturbs, and grad f(x_t; B_t), which it stands for
    ``lookahead_distance``   Euclidean, between the same (Xie, Pethick, Cevher 2024, Figure 4)
    ``held_out_loss``        f(x_t) on batches of the evaluation data, in evaluation mode, as all of the following
    ``held_out_sharpness``   f(x_t + rho g / ||g||) - f(x_t), g = grad f(x_t) on these batches
    ``hessian_eigenvalue``   the largest one of the Hessian of f at x_t
    ``displacement_length``  of rho g / ||g||, what mixed precision leaves of it where it rounds the weights: of its length,
    ``displacement_cosine``  and the cosine between the two
    =======================  =========================================================================================

    The first two are those of SAMPa's timing, from its second step on; the others need an evaluation dataset with labels,
    of several the first. The last two are those of autocast to half precision. The training is the same without it, bit for bit.
    While it measures, a process holds two or three numbers per trainable weight more, and the graph of the held-out losses, which
    grows with the evaluation batch.

    Where the best weights were loaded at the end, the last line is of those, and ``weights_step`` names their step.

    Args:
        trainer: whose run it is; ``trainer.add_callback(DiagnosticsCallback(trainer))``.
        every: steps between two measurements, at least 1.
        batches: how many evaluation batches to measure on, the first ones of the dataset; at least 1.
        iterations: products of the Hessian with a vector, at most so many, twice as many where it is indefinite. They are most of
            what measuring costs; 0: there is no ``hessian_eigenvalue``.
        tolerance: relative change of the eigenvalue at which to stop earlier.
        radius: that of ``held_out_sharpness``, in the units of the weights, at least 0; by default the run's rho.

    Raises:
        ValueError: an argument is of another type or out of range, or `trainer` is neither one of SAMPa's nor the baseline's.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 100,
        batches: int = 1,
        iterations: int = 20,
        tolerance: float = 0.01,
        radius: float | None = None,
    ):
        for name, value, least in (("every", every, 1), ("batches", batches, 1), ("iterations", iterations, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}.")
        for name, value in {"tolerance": tolerance, "radius": 0.0 if radius is None else radius}.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}.")
        if not hasattr(trainer, "lookahead_error"):
            raise ValueError(f"trainer: expected a SAMPaTrainer or BaselineTrainer, got {type(trainer).__name__}.")
        self.trainer, self.every, self.batches = trainer, every, batches
        self.iterations, self.tolerance, self.radius = iterations, tolerance, radius
        self._held_out: list[MicroBatch] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._held_out = None
        dataset, callbacks = self.trainer.eval_dataset, self.trainer.callback_handler.callbacks
        if not any(each is self for each in callbacks):
            raise ValueError("trainer: expected the one that the callback was added to, got another.")
        if dataset is None or (has_length(dataset) and not len(dataset)):
            what = "only the look-ahead is" if args.method == "sampa" else "nothing is"
            logger.warning(f"Diagnostics: {what} measured, since the trainer has no eval_dataset.")
        elif units(self.trainer.model):
            what = "only the look-ahead is" if args.method == "sampa" else "nothing is"
            logger.warning(
                f"Diagnostics: {what} measured of a model that FSDP has sharded, which has no second derivatives."
            )
        elif isinstance(dataset, dict) and len(dataset) > 1:
            logger.warning(
                f"Diagnostics: of the evaluation datasets the first, {next(iter(dataset))!r}, is measured on."
            )
        if [each for each in callbacks if isinstance(each, DiagnosticsCallback)][0] is not self:
            logger.warning(
                "Diagnostics: two callbacks measure. Leave out diagnostics_steps, or the callback of your own."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            error = self.trainer.lookahead_error()
            found = {} if error is None else {"lookahead_cosine": error[0], "lookahead_distance": error[1]}
            self._log({**found, **self.measure()})

    def on_train_end(self, args, state, control, **kwargs):
        found = self.measure()
        if found and self.trainer.weights_step != state.global_step:
            found["weights_step"] = self.trainer.weights_step
        self._log(found)

    def _log(self, found: dict[str, float]) -> None:
        if found:
            self.trainer.log(found)

    def measure(self) -> dict[str, float]:
        """What there is to say of the weights as they are, on held-out batches; nothing without evaluation data, or of shards."""
        if units(self.trainer.model):
            return {}
        with self._aside():
            if not self._batches():
                return {}
            params = [param for param in self.trainer.model.parameters() if param.requires_grad]
            curvature = {"hessian_eigenvalue": self._eigenvalue(params)} if self.iterations else {}
            return {**self._sharpness(params), **curvature}

    def _eigenvalue(self, params: list[Tensor]) -> float:
        generator = torch.Generator().manual_seed(derive_seed(self.trainer.args.seed, "hessian"))
        start = [torch.randn(param.shape, generator=generator).to(param) for param in params]
        with sdpa_kernel(SDPBackend.MATH):
            product = hessian_product(self._losses(), params)
            return largest_eigenvalue(product, start, self.iterations, self.tolerance)

    def _sharpness(self, params: list[Tensor]) -> dict[str, float]:
        losses = self._losses()
        loss = sum(losses).item()
        grads = torch.autograd.grad(sum(losses), params, allow_unused=True)
        grads = [torch.zeros_like(param) if g is None else g for param, g in zip(params, grads, strict=True)]
        del losses
        radius = self.trainer.args.rho if self.radius is None else self.radius
        moved = Buckets(params)
        perturb(params, grads, radius, global_norm(grads), out=moved.views)
        with holding(params, moved.views), torch.no_grad(), Rounded(moved.views) as rounded:
            sharpness = sum(self._losses()).item() - loss
        found = {"held_out_loss": loss, "held_out_sharpness": sharpness}
        if rounded.to:
            x, displaced = ([each[i] for i in rounded.to] for each in (params, moved.views))
            length, cosine = left_of_displacement(x, displaced, list(rounded.to.values()))
            found |= {"displacement_length": length, "displacement_cosine": cosine}
        return found

    def _losses(self) -> list[Tensor]:
        """Each batch's share of the mean loss over all of them."""
        trainer, counts = self.trainer, [batch.count_items() for batch in self._batches()]
        found = []
        for batch, count in zip(self._batches(), counts, strict=True):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch.inputs)))
            found.append(loss * (count / sum(counts)))
        return found

    def _batches(self) -> list[MicroBatch]:
        """The first evaluation batches, the same on every process; read once. An empty list without any."""
        if self._held_out is None:
            dataset, self._held_out = self.trainer.eval_dataset, []
            if dataset is not None and not (has_length(dataset) and not len(dataset)):
                name = next(iter(dataset)) if isinstance(dataset, dict) else None
                loader = self.trainer.get_eval_dataloader(name)
                loader = getattr(loader, "unprepared", loader)  # not one process's part
                inputs: list[dict[str, Any]] = list(islice(loader, self.batches))
                if self._have_loss(inputs):
                    self._held_out = [MicroBatch(each, update=0, position=i) for i, each in enumerate(inputs)]
        return self._held_out

    @torch.no_grad()
    def _have_loss(self, inputs: list[dict[str, Any]]) -> bool:
        """Whether the model has one without labels, if there are none: for Trainer evaluation data need no labels."""
        trainer = self.trainer
        if all(each.get(name) is not None for each in inputs for name in trainer.label_names):
            return True
        try:
            for each in inputs:
                trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(each)))
        except (KeyError, TypeError, ValueError) as error:  # what models and losses raise that miss their labels
            logger.warning(f"Diagnostics: nothing is measured on evaluation data without labels: {error}")
            return False
        return True

    @contextmanager
    def _aside(self):
        """Evaluation mode, a pass's view of the world, and generators that nobody else sees."""
        model, args = self.trainer.model, self.trainer.args
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with self.trainer.aside(), seeded(derive_seed(args.seed, "diagnostics"), args.device):
                yield
        finally:
            for module in training:
                module.training = True


class WithDiagnostics:
    """Put it above a `Trainer` whose arguments are of a class with `SAMPaArgumentsMixin`: it measures as these ask for."""

    def _add_diagnostics(self) -> None:
        if self.args.diagnostics_steps:
            args = self.args
            self.add_callback(
                DiagnosticsCallback(
                    self,
                    args.diagnostics_steps,
                    iterations=args.diagnostics_iterations,
                    radius=args.diagnostics_radius,
                )
            )

    def add_callback(self, callback):
        """Diagnostics go first: at the end of the training they log, and trackers before them would have closed their run."""
        super().add_callback(callback)
        if isinstance(callback, DiagnosticsCallback):
            callbacks = self.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop())
