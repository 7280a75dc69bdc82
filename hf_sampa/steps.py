"""The steps of a run in `transformers.Trainer`: what happens between an update batch and ``.grad``.

The loop calls ``training_step`` for every micro-batch: it is given `Steps.step`, which runs the whole step with the last of
them. The class's own ``training_step`` is what a pass does with a micro-batch (`hf_sampa.micro_batches`).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from transformers.trainer_utils import has_length

from .checks import check_not_compiled, check_settings_kept, check_trainable
from .data import UpdateBatch, set_halves
from .distributed import Role, check_repeatable
from .engine import SAM, Placement, SAMPa, SampleView, Shared, StepReport, check_separable, check_whole
from .micro_batches import OF_A_PASS, MicroBatches
from .monitoring import show
from .one_pass import Attributes, OnePass, Views
from .readers import reader_of
from .state import Collected, other_modules


if TYPE_CHECKING:
    from .run import Run

logger = get_logger(__name__)

# Settings that decide how a run is put together. Others, rho and lambda among them, may change while it goes on.
FIXED = (
    "method",
    "variant",
    "variant_args",
    "shard_optimizer",
    "pairs_on_one_node",
    "overlap_exchange",
    "concurrent",
    "sampa_start",
    "gradient_accumulation_steps",
    "seed",
)


class Steps:
    """Takes the steps of a run, with the engine that its settings ask for.

    Args:
        run: whose steps they are.
        max_steps: T.

    Attributes:
        engine: what computes them.
        start: t of the first sharpness-aware step; those before it are the base optimizer's alone.
        micro_batches: what a pass does with a micro-batch.
        collected: what the trainer's own code keeps on the trainer during a pass.
    """

    def __init__(self, run: Run, max_steps: int):
        self.run, self.trainer = run, run.trainer
        self.micro_batches = MicroBatches(self)
        self.engine = self._engine(max_steps)
        self.collected = Collected(self.trainer, ("transformers.", "hf_sampa."), run.exchange)
        self.engine.digest_of_rest, self.engine.share_rest = self._digest_of_rest, self._share_what_was_collected
        if self.trainer.args.concurrent:
            self.engine.one_pass = self._one_pass()
        self.start = self.trainer.args.first_sharp_step(max_steps)
        self._rehearsed = False  # whether the run's first batch has been through `_rehearse`
        self._told = False  # what there is to know of how batches are shared out
        self._is_sharp = False  # whether sharpness-aware steps have begun
        self._fixed = {name: copy.deepcopy(getattr(self.trainer.args, name)) for name in FIXED}
        optimizer = self.trainer.optimizer.optimizer
        self._hooks = [
            optimizer.register_step_post_hook(run.clock.stop),
            optimizer.register_step_pre_hook(self.micro_batches.refuse_update),
        ]

    def _engine(self, max_steps: int) -> SAMPa | SAM:
        trainer, args, micro_batches = self.trainer, self.trainer.args, self.micro_batches
        optimizer, exchange, dataset = trainer.optimizer.optimizer, self.run.exchange, trainer.train_dataset
        recipe = self.run.recipe()
        if recipe.adapters.adds:
            check_not_compiled(trainer.model, args)
        if args.shard_optimizer:
            check_whole(recipe)
            check_separable(optimizer)  # on one process, too, so that what starts there starts on two
        look = partial(micro_batches.look, trainer.model_wrapped)
        scaler = trainer.accelerator.scaler
        common = {
            "rho": args.rho,
            "recipe": recipe,
            "placement": Shared if args.shard_optimizer and args.world_size > 1 else Placement,
            "others": other_modules(trainer, trainer.model),
            "overlap": args.overlap_exchange,
            "partial_backward": not args.torch_compile,
            "unscale": None if scaler is None else scaler.inverse_scale,
            "samples": SampleView(exchange, look, micro_batches.weigh, micro_batches.loss_at),
            "max_steps": max_steps,
            "num_samples": len(dataset) if has_length(dataset) else 0,
            "seed": args.seed,
        }
        if args.method == "sam":
            engine = SAM(trainer.model, optimizer, exchange, **common)
        else:
            clip_scale = partial(_clip_scale, args)
            engine = SAMPa(trainer.model, optimizer, exchange, lmbda=args.lmbda, clip_scale=clip_scale, **common)
        engine.weights.reduces_each = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return engine

    def _one_pass(self) -> OnePass:
        """Both gradients of a step at once."""
        trainer, micro_batches, collected = self.trainer, self.micro_batches, self.collected
        kept = Views(partial(collected.remembered, known=True))
        return OnePass(
            self.engine,
            own=[Attributes((micro_batches, "in_pass"), *((trainer, name) for name in OF_A_PASS)), kept],
            generators=micro_batches.own_generators,
            remember=collected.remembered,
            noted=lambda: len(collected.changed),
            rough=trainer.accelerator.mixed_precision != "no"
            or any(_is_short(each) for each in trainer.model.parameters()),
        )

    def go_on(self, plain: int | None, step: int) -> None:
        """Go on after `step` steps, of which `plain` were the base optimizer's alone; None: as many as the settings say.

        Sharpness-aware steps that have begun go on, whatever the settings say by now.
        """
        asked, plain = self.start, min(self.start, step) if plain is None else plain
        self.start = plain if plain < step else max(asked, step)
        if self.start != asked:
            logger.warning(
                f"sampa_start: by {self.trainer.args.sampa_start:g} steps would be sharpness-aware from step {asked + 1} on. In this run they are "
                f"so from step {self.start + 1} on, because of the steps before the checkpoint."
            )

    def close(self) -> None:
        """Take everything off model and optimizer, and let go of the engine and its buffers."""
        self.engine.close()
        for hook in self._hooks:
            hook.remove()
        self.engine = self.micro_batches = None

    # ---- A step ----

    @property
    def is_plain(self) -> bool:
        """Whether the step in progress, or else the one that comes next, is the base optimizer's alone."""
        return self.trainer.state.global_step < self.start

    def step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """What the loop calls for every micro-batch; returns the loss that is logged, of the whole update batch."""
        run, trainer, engine = self.run, self.trainer, self.engine
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        run.clock.start()
        engine.weights.settle()
        check_trainable(trainer.model, trainer.optimizer.optimizer, engine.params)
        self._follow_settings()
        # Before the weights are displaced: schedule-free optimizers move them when they change modes.
        model.train()
        if hasattr(trainer.optimizer, "train"):
            trainer.optimizer.train()
        run.stage = "in passes"
        if not self._rehearsed:
            self._rehearse(model)
        self._check_readers()
        report = self._run_engine(model)
        run.stage = "in update"
        if engine.placement.shared:
            engine.placement.note_gradients()
        show(trainer, report)
        self._say_what_is_skipped(report)
        run.means.add(report, engine.skipped_steps)
        # Filled by the device: a copy from the host would wait for it.
        return torch.full((), report.loss, dtype=torch.float32, device=trainer.args.device)

    def _run_engine(self, model) -> StepReport:
        batch, next_batch = self.run.batch, self.run.stream.peek()
        backward = partial(self.micro_batches.backward, model)
        self.micro_batches.weigh(batch)
        if self.is_plain:
            report = self.engine.plain_step(batch, backward)
            self._say_what_is_shared_out(batch)
        else:
            self._begin_to_be_sharp()
            if next_batch is not None and self.engine.reads_next_batch:
                self.micro_batches.weigh(next_batch)
            report = self.engine.step(batch, next_batch, backward)
        self._share_what_was_collected()
        return report

    def _say_what_is_shared_out(self, batch: UpdateBatch) -> None:
        """Once, before sharpness-aware steps of a pair, that a batch is not, or that the trainer's own numbers are of its half."""
        if self._told or not isinstance(self.engine, SAMPa):
            return
        (*others, last), counts = batch, ", ".join(sorted(self.collected.changed))
        # A rest of an epoch may be too small to be shared out.
        whole = len(others) % 2 == 0 and last.halves is None and last.size >= self.trainer._train_batch_size
        if whole and self.engine.exchange.mesh.paired:
            logger.warning(
                f"Step {batch.update + 1}: its last micro-batch cannot be shared out. It is one sample, or no dict that a collator makes of "
                "samples of a dataset with a length. Before sampa_start one half of a pair takes such micro-batches whole, and the other waits. "
                "To share batches out, halve per_device_train_batch_size and double gradient_accumulation_steps."
            )
        elif counts:
            logger.info(
                f"What {type(self.trainer).__name__} counts of itself ({counts}) is that of the first half of each batch until step "
                f"{self.start + 1}, from which on it is that of the whole: before it the halves of a pair share the batch out."
            )
        self._told = whole or bool(counts)

    def _say_what_is_skipped(self, report: StepReport) -> None:
        scaler = self.trainer.accelerator.scaler
        if report.skipped:
            # Overflows of fp16 are usual in the first steps.
            hint = self.engine.late_reader() if scaler is None else ""
            logger.warning(
                f"Step {self.trainer.state.global_step + 1} had a gradient that is not finite and is skipped; "
                f"{self.engine.skipped_steps} step(s) so far.{hint}"
            )
        if scaler is not None:
            scaler.overflow = report.skipped

    def _rehearse(self, model) -> None:
        """Find, before the first step of a run, what passes leave behind unseen or do otherwise on one process. A collective."""
        args, batch = self.trainer.args, self.run.batch
        if getattr(self.engine, "ascent", None) is None:  # a run that goes on was rehearsed when it began
            self.micro_batches.weigh(batch)
            some = next((each for each in batch if each.counts), batch.micro_batches[0])
            part = replace(batch, micro_batches=[some])
            with self.collected.rehearsal():
                found = self.engine.rehearse(part, partial(self.micro_batches.backward, model))
            repeats = args.device.type == "cpu" and not args.torch_compile
            check_repeatable(self.run.exchange, found, part.fingerprint, exact=repeats)
        self._rehearsed = True

    def _begin_to_be_sharp(self) -> None:
        """Before the first sharpness-aware step of this call of ``train()``."""
        if not self._is_sharp:
            set_halves(self.run.loader, False)
            self._hold_parts()
            self._is_sharp = True

    def _hold_parts(self) -> None:
        """Let each process hold the weights that it updates, unless something reads all of them between steps. A collective."""
        if not self.engine.placement.shared:
            return
        reader = next(filter(None, self.run.exchange.share_objects(reader_of(self.trainer))), None)
        if reader is None:
            self.engine.placement.hold_parts()
        else:
            logger.info(
                f"shard_optimizer: all weights are brought together after every step, for {reader} may read them."
            )

    def _check_readers(self) -> None:
        if self.engine.placement.in_parts and (reader := reader_of(self.trainer)):
            raise RuntimeError(
                f"shard_optimizer: expected what reads the model between two steps to be there when training begins, but {reader} came later: "
                "each process holds a part of the weights by now. Add it before train(), or leave shard_optimizer out."
            )

    def _follow_settings(self) -> None:
        """Take over what a callback may have changed, and refuse what cannot be followed."""
        args, engine = self.trainer.args, self.engine
        check_settings_kept(args, self._fixed)
        if (args.rho, args.lmbda) != (engine.rho, getattr(engine, "lmbda", args.lmbda)):
            args.check_settings()
            engine.rho = args.rho
            if isinstance(engine, SAMPa):
                engine.lmbda = args.lmbda

    # ---- What passes leave on the trainer ----

    def _digest_of_rest(self) -> int:
        return self.collected.digest() + len(self.micro_batches.said)

    def _share_what_was_collected(self) -> None:
        """What the reported passes left on the trainer, and what they logged, is the same on both halves of a pair."""
        if self.engine.rest_differs:
            mesh = self.run.exchange.mesh
            of_all = self.run.exchange.share_objects((self.collected.state_dict(), self.micro_batches.said))
            if mesh.roles[0] is not Role.LOOKAHEAD:
                state, self.micro_batches.said = of_all[mesh.peer]
                self.collected.load_state_dict(state)
        said, self.micro_batches.said = self.micro_batches.said, []
        for given, named in said:
            self.trainer.log_of_a_pass(*given, **named)

    # ---- Between steps ----

    def lookahead_error(self) -> tuple[float, float] | None:
        """As in `SAMPa.lookahead_error`, of the batch that is about to be trained on; None for sequential methods."""
        if not isinstance(self.engine, SAMPa):
            return None
        self.micro_batches.weigh(self.run.batch)
        return self.engine.lookahead_error(
            self.run.batch, partial(self.micro_batches.backward, self.trainer.model_wrapped)
        )


def _is_short(tensor: torch.Tensor) -> bool:
    """Whether it is of half precision, or quantized to less."""
    return tensor.element_size() < 4


def _clip_scale(args: Any, norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by."""
    return min(1.0, args.max_grad_norm / (norm + 1e-6)) if args.max_grad_norm > 0 else 1.0
