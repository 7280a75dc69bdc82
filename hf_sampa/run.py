"""One call of ``train()``: the processes it reaches, its stream of batches, its steps and sums, and where in all that it is.

`SAMPaMixin.train` makes it and leaves it. What of a run is not Trainer's own is here, and nothing of it on the trainer.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from torch.profiler import record_function
from torch.utils.data import DataLoader

from .checkpoints import Resume, Saving
from .checks import check_loader
from .data import Place, UpdateBatch, UpdateStream, check_samplers, replica_loader, seeded_loader, set_halves
from .distributed import Exchange, Mesh
from .engine import SAM, SAMPa
from .monitoring import RunningMeans, StepClock
from .state import stood_in
from .steps import Steps
from .variants import Recipe


if TYPE_CHECKING:
    from .trainer import SAMPaMixin


logger = get_logger(__name__)


class Run:
    """What lives as long as one call of ``train()``, and after it until the next begins, for a checkpoint by hand.

    Args:
        trainer: whose run it is.
        before: its run before this one, whose connections are taken over.

    Attributes:
        exchange: connects the processes; None where an exception has cut what they were sending.
        loader: what the stream reads.
        stream: the update batches, one step ahead of the loop; None before the first epoch and after the end.
        batch: B_t from the beginning of step t on.
        steps: takes the steps; None until it is known what is trained.
        means: over the steps since the last log line.
        clock: how long steps take.
        saving, resume: what is saved of the run, and what it takes up.
        stage: "between" two steps, "in passes", "in update" (from G_t to the end of the step), or "before saving".
        in_epoch: whether the loop is in an epoch.
        left_epoch: whether a callback ended the epoch before its data were over.
        place: where the data go on, while there is no stream.
        ready: whether all that steps need is there, and nothing was refused.
        active: whether ``train()`` is still at it.
        broken: the stage in which the run was interrupted.
    """

    def __init__(self, trainer: SAMPaMixin, before: Run | None):
        self.trainer, self._before = trainer, before
        self.exchange: Exchange | None = None if before is None else before.exchange
        self.connect()
        self.exchange.bytes_sent = 0
        self.loader: DataLoader | None = None
        self.stream: UpdateStream | None = None
        self.batch: UpdateBatch | None = None
        self.steps: Steps | None = None
        self.means, self.clock = RunningMeans(), StepClock()
        self.saving, self.resume = Saving(self), Resume(self)
        self.stage, self.ready, self.active = "between", False, True
        self.in_epoch = self.left_epoch = False
        self.place, self.broken = Place(0, 0), None

    @property
    def mesh(self) -> Mesh:
        """Who takes part."""
        return self.trainer.args.mesh

    @property
    def engine(self) -> SAMPa | SAM | None:
        """What computes the steps."""
        return None if self.steps is None else self.steps.engine

    def recipe(self) -> Recipe:
        """What its steps are made of; a copy, so that a recipe of one's own begins every run as it was made."""
        own = self.trainer._recipe
        return self.trainer.args.recipe() if own is None else copy.deepcopy(own)

    def connect(self) -> None:
        """Reach the other processes, if they are not reached yet."""
        if self.exchange is None or self.exchange.mesh != self.mesh:
            self.exchange = Exchange(self.mesh, timeout=timedelta(seconds=self.trainer.args.ddp_timeout))

    def reach_others(self) -> None:
        """Connect the processes anew, where an exception has cut what they were sending."""
        if self.exchange is None:
            self.connect()
            self.engine.connect(self.exchange)
            self.steps.collected.exchange = self.exchange

    def gather_weights(self) -> None:
        """Before something looks at the model outside of a step: make the weights whole, where each process holds a part. A collective."""
        in_passes = self.active and self.stage == "in passes"
        if self.engine is not None and not self.engine.placement.whole and not in_passes:
            self.reach_others()
            self.engine.placement.gather_weights()

    def lose_parts(self) -> None:
        """After an exception."""
        if self.engine is not None and self.engine.placement.lose_parts():
            logger.error(
                "With shard_optimizer each process holds a part of the weights: the others are NaN here now. evaluate(), save_model() or "
                "train(), called by all processes, brings them together; so does resume_from_checkpoint=True in a new run."
            )

    # ---- Before the first step ----

    def read_from(self, dataloader: Any) -> Any:
        """Both roles read `dataloader`, which Trainer has made, by replica; returns what the stream iterates over."""
        args, recipe = self.trainer.args, self.recipe()
        loader = replica_loader(dataloader, args.mesh, args.accelerator_config.split_batches, args.data_seed)
        reads_indices = recipe.reads_indices or recipe.mask.fisher_samples > 0
        self.loader = seeded_loader(loader, self.data_seed, reads_indices)
        check_loader(self.loader, args)
        check_samplers(self.loader, args.mesh)
        return self.loader

    @property
    def data_seed(self) -> int:
        """Seeds the order of the data and what is drawn for single samples."""
        args = self.trainer.args
        return args.seed if args.data_seed is None else args.data_seed

    def make_room(self) -> None:
        """Let go of an engine of this trainer, of the run before or of another batch size: its buffers are freed before new ones are made."""
        self.ready = False
        for run in (self._before, self):
            if run is not None and run.steps is not None:
                run.steps.close()
                run.steps = None
        self._before = None

    def begin(self, max_steps: int) -> None:
        """Build what steps need."""
        self.means, self.clock = RunningMeans(), StepClock()
        self.steps = Steps(self, max_steps)
        self.engine.begin_alike()
        self.engine.check_state()
        self.stream = self.batch = self.broken = None
        self.left_epoch, self.stage = False, "between"

    def to_log(self) -> dict[str, float]:
        """Means over the steps since the last line, and how many steps of the run were the base optimizer's alone, if any were to be."""
        return {**self.means.take(), **({"plain_steps": self.plain_steps} if self.plain_steps else {})}

    # ---- The stream ----

    def open_stream(self, epoch: int, start: int) -> None:
        """Begin the stream at micro-batch `start` of `epoch`."""
        args = self.trainer.args
        set_halves(self.loader, args.method == "sampa" and self.steps.is_plain)
        with self.exchange.role_world.lent():
            self.stream = UpdateStream(
                self.loader,
                seed=self.data_seed,
                accumulation=args.gradient_accumulation_steps,
                epoch=epoch,
                start=start,
                update=self.trainer.state.global_step,
                read=self._read,
            )
        self.batch = None

    def _read(self, iterator, num_batches) -> list:
        """The micro-batches of an update batch, by the class's own ``get_batch_samples``, read one step ahead of the loop."""
        samples, _ = self._read_own(iterator, num_batches, self.trainer.args.device)
        return samples

    def epoch(self, loop, **kwargs) -> None:
        """One epoch of Trainer's `loop`, which iterates over nothing: its batches are the stream's, its training step is ours."""
        trainer = self.trainer
        self.steps.micro_batches.training_step = trainer.training_step
        self._read_own = trainer.get_batch_samples
        if self.stream is None:
            self.open_stream(kwargs["epoch"], kwargs["steps_trained_in_current_epoch"])
            self.resume.at_the_first_batch()
        elif (ahead := self.stream.peek()) and (ahead.start or self.begun):
            # A callback ended the epoch early, maybe between micro-batches: the batch that comes next, or the one that had
            # begun, will not be trained on, and with it goes its g_t.
            self.stream.leave_epoch(trainer.state.global_step)
            if isinstance(self.engine, SAMPa):
                self.engine.forget()
        self._epoch_in_stream, _ = self.stream.position
        self.left_epoch, self.in_epoch = False, True
        events = trainer.callback_handler
        try:
            with (
                stood_in(trainer, "training_step", self.steps.step),
                stood_in(trainer, "get_batch_samples", self._next_batch),
                stood_in(events, "on_epoch_end", partial(self.saving.end_epoch, events.on_epoch_end)),
            ):
                loop(train_dataloader=DataLoader([]), **kwargs)
        finally:
            self.left_epoch, self.in_epoch = trainer.control.should_epoch_stop, False

    def _next_batch(self, epoch_iterator, num_batches, device):
        """What the loop calls to get an update batch."""
        self.saving.note_counts()
        ahead = self.stream.peek()
        if ahead is None or ahead.epoch != self._epoch_in_stream:
            return [], None  # an epoch of unknown length, or all there is to read, is over
        with record_function("SAMPa.data"), self.exchange.role_world.lent():
            self.batch = self.stream.advance()
        samples = [micro_batch.inputs for micro_batch in self.batch]
        # A group that ends early without the loop's knowing still has to reach its optimizer step. Items are counted by
        # micro-batch, in `MicroBatches.weigh`.
        return samples + [{}] * (num_batches - len(samples)), None

    # ---- Where it is ----

    @property
    def plain_steps(self) -> int:
        """How many of its steps so far were the base optimizer's alone."""
        return min(self.steps.start, self.trainer.state.global_step)

    @property
    def begun(self) -> bool:
        """Whether the step that comes next has its batch already."""
        return self.batch is not None and self.batch.update == self.trainer.state.global_step

    def next_place(self) -> Place:
        """Where the data go on after the last step that is through."""
        if self.stream is None:
            return self.place
        batch = self.batch if self.begun else self.stream.peek()
        if batch is None:
            return Place(*self.stream.position, 0)
        left = self.left_epoch or (self.in_epoch and self.trainer.control.should_epoch_stop)
        if left and (batch.start or self.begun):
            # The rest of this epoch, and with it g_t, is not trained on.
            return Place(batch.epoch + 1, 0)
        return Place(batch.epoch, batch.start, batch.fingerprint)

    def leave(self) -> None:
        """Keep what a checkpoint by hand will need, and end the workers that read ahead."""
        self.saving.take_back_counts()
        self.place = self.next_place()
        self.broken = self.stage if self.begun and self.stage in ("in passes", "in update") else self.broken
        self.stream = self.batch = None
        self.active = False
        self.saving.leave()
