"""SAMPa in `transformers.Trainer`: a mixin that overrides the training step and keeps everything else.

The loop stays Trainer's. It is handed the micro-batches of B_t one by one; with the last of them `training_step` runs
the whole step for B_t and B_{t+1} (`hf_sampa.sampa`) and leaves G_t in ``.grad``, where Trainer clips it, takes the base
optimizer's step, logs, evaluates and saves as always.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from accelerate.logging import get_logger
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import Trainer

from .batches import UpdateStream
from .card_facts import CardFacts
from .checks import check_dataset, check_loader, check_model, check_optimizer, check_trainer
from .diagnostics import DiagnosticsCallback
from .exchange import Exchange
from .loaders import replica_loader, seeded_loader
from .metrics import RunningMeans
from .progress import replace_progress_bar
from .publish import PublishMixin, StepClock
from .recipe import Recipe, check_recipe
from .resume import ResumeMixin
from .sam import SAM
from .sampa import SAMPa
from .step import StepMixin
from .training_args import SAMPaArgumentsMixin, SAMPaTrainingArguments
from .variants import find


logger = get_logger(__name__)


class SAMPaMixin(StepMixin, PublishMixin, ResumeMixin):
    """Sharpness-aware steps for any `Trainer`: ``class Mine(SAMPaMixin, SomeTrainer)``.

    Takes what the Trainer below it takes; `args` must be of a class with `SAMPaArgumentsMixin`. Started by one process
    it plays both roles in turn, by 2k processes it spreads them, with the same numbers.

    Args:
        recipe: what a step is made of, instead of the recipe of ``args.variant``; see `hf_sampa.recipe`.

    Attributes:
        sampa: the engine (`hf_sampa.sampa.SAMPa` or `SAM`) of the training run in progress or just ended.

    Raises:
        ValueError: the world, the precision or the model cannot be used with SAMPa; see `hf_sampa.checks`.
    """

    sampa: SAMPa | SAM | None = None

    def __init__(self, model=None, args=None, *other, recipe: Recipe | None = None, **kwargs):
        args = SAMPaTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, SAMPaArgumentsMixin):
            raise ValueError(
                f"args: expected SAMPaTrainingArguments, or a class of yours with SAMPaArgumentsMixin, got "
                f"{type(args).__name__}."
            )
        args.mesh  # refuses odd worlds before anything is built  # noqa: B018
        super().__init__(model, args, *other, **kwargs)
        check_recipe(recipe, args.variant)
        self._recipe = recipe
        check_trainer(self)
        self._progress = replace_progress_bar(self)
        self.card_facts, self._clock, self._evaluations, self.continued = CardFacts(), StepClock(), [], []
        self.add_callback(self._clock)
        if args.diagnostics_steps:
            self.add_callback(DiagnosticsCallback(self, args.diagnostics_steps))
        # Every loss is the mean over one micro-batch here; `_micro_gradient` does the weighing.
        self.loss_is_scaled_for_ga = False
        self._exchange: Exchange | None = None
        self._stream: UpdateStream | None = None
        self._means = RunningMeans()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # "evaluation mode" prepares autocast and compilation and leaves out DDP, which would average the two roles.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        prepare = self.accelerator.prepare_data_loader

        def prepare_and_remember(data_loader: DataLoader, *args, **kwargs) -> DataLoader:
            prepared = prepare(data_loader, *args, **kwargs)
            # What `replica_loader` shards by replica instead of by rank.
            prepared.unprepared = getattr(data_loader, "unprepared", data_loader)
            return prepared

        self.accelerator.prepare_data_loader = prepare_and_remember

    # ---- Data: one stream for both roles ----

    def get_train_dataloader(self) -> DataLoader:
        check_dataset(self.train_dataset)
        return super().get_train_dataloader()

    def set_initial_training_values(self, args, dataloader):
        loader = replica_loader(dataloader, args.mesh, args.accelerator_config.split_batches, args.data_seed)
        recipe = self._recipe or args.recipe()
        self._loader = seeded_loader(loader, self._data_seed, recipe.reads_indices or recipe.mask.fisher_samples > 0)
        check_loader(self._loader, args)
        return super().set_initial_training_values(args, self._loader)

    def get_total_train_batch_size(self, args) -> int:
        # Two ranks of a pair read one batch.
        return super().get_total_train_batch_size(args) * args.num_replicas // args.world_size

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _run_epoch(self, train_dataloader, **kwargs):
        if self._stream is None:
            self._open_stream(kwargs["epoch"], kwargs["steps_trained_in_current_epoch"])
        elif self._stream.peek().start:
            # A callback ended the epoch early: the batch ahead will not be trained on, and with it goes its g_t.
            self._stream.leave_epoch()
            if isinstance(self.sampa, SAMPa):
                self.sampa.forget()
        self._epoch_in_stream = self._stream.peek().epoch
        # The loop only iterates over and fast-forwards what it is given; `get_batch_samples` reads the stream.
        super()._run_epoch(train_dataloader=DataLoader([]), **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._stream.peek().epoch != self._epoch_in_stream:
            return [], None  # an epoch of unknown length is over
        with record_function("SAMPa.data"):
            self._batch = self._stream.advance()
        inputs = iter([micro_batch.inputs for micro_batch in self._batch])
        samples, num_items = super().get_batch_samples(inputs, num_batches, device)
        # A group that ends early without the loop's knowing still has to reach its optimizer step.
        return samples + [{}] * (num_batches - len(samples)), num_items

    def _track_num_input_tokens(self, inputs):
        before = self.state.num_input_tokens_seen
        if inputs:
            super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted * self.args.num_replicas // self.args.world_size

    def floating_point_ops(self, inputs) -> int:
        # Each role is a forward and a backward pass.
        return super().floating_point_ops(inputs) * len(self.args.mesh.roles)

    # ---- A run ----

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        options = {} if self._recipe else find(self.args.variant).optimizer
        for group in self.optimizer.param_groups:
            if missing := options.keys() - group.keys():
                raise ValueError(
                    f"optim: expected an optimizer with the option {', '.join(missing)} for variant {self.args.variant!r}, got "
                    f"{type(self.optimizer).__name__}. Set optim='adamw_torch'."
                )
            group.update(options)
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self.args.check_settings()
        check_model(self.model)
        if self.sampa is not None:
            self.sampa.close()
            self.sampa = None  # frees its buffers before new ones are made
        model, _ = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        check_optimizer(self.optimizer.optimizer, self.model)
        if self._exchange is None or self._exchange.mesh != self.args.mesh:
            self._exchange = Exchange(self.args.mesh, timeout=timedelta(seconds=self.args.ddp_timeout))
        self._exchange.bytes_sent = 0
        self._exchange.broadcast([*self.model.parameters(), *self.model.buffers()])
        self.sampa = self._engine(max_steps)
        self.sampa.check_state()
        self._stream, self._means = None, RunningMeans()
        self.callback_handler.train_dataloader = self._loader
        self._resume(resume_from_checkpoint)
        return model, self._loader

    def add_callback(self, callback):
        super().add_callback(callback)
        if isinstance(callback, DiagnosticsCallback):
            # It logs at the end of the training, when trackers further up would have closed their run.
            callbacks = self.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop())

    def unlogged_means(self) -> dict[str, float]:
        """Means over the steps since the last log line, by the names that they are logged under."""
        return self._means.means() if self._means else {}

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self._means.take())
        super().log(logs, *args, **kwargs)


class SAMPaTrainer(SAMPaMixin, Trainer):
    """`transformers.Trainer` that trains with SAMPa or SAM; takes what Trainer takes, see `SAMPaMixin`."""
