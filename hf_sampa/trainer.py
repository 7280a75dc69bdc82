"""SAMPa in `transformers.Trainer`: a mixin that overrides the training step and keeps everything else.

The loop stays Trainer's. It is handed the micro-batches of B_t one by one; with the last of them `training_step` runs
the whole step for B_t and B_{t+1} (`hf_sampa.engine.sampa`) and leaves G_t in ``.grad``, where Trainer clips it, takes the base
optimizer's step, logs, evaluates and saves as always.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial

from accelerate.logging import get_logger
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from .cards import CardFacts, PublishMixin, StepClock
from .checkpoints import ResumeMixin
from .checks import (
    check_dataset,
    check_groups,
    check_loader,
    check_model,
    check_not_generating,
    check_optimizer,
    check_precision,
    check_trainer,
)
from .data import UpdateStream, check_samplers, replica_loader, seeded_loader
from .distributed import Exchange, check_same_start
from .engine import SAM, SAMPa, Trained
from .monitoring import DiagnosticsCallback, RunningMeans
from .start import started_with
from .state import other_modules, stood_in
from .step import StepMixin
from .training_args import SAMPaArgumentsMixin, SAMPaTrainingArguments
from .variants import Recipe, check_recipe, find


logger = get_logger(__name__)


class SAMPaMixin(StepMixin, PublishMixin, ResumeMixin):
    """Sharpness-aware steps for any `Trainer`: ``class Mine(SAMPaMixin, SomeTrainer)``.

    Takes what the Trainer below it takes, in its order; `args` must be of a class with `SAMPaArgumentsMixin`. Started by one process
    it plays both roles in turn, by 2k processes it spreads them, with the same numbers.

    Args:
        recipe: what a step is made of, instead of the recipe of ``args.variant``; see `hf_sampa.variants.recipe`.

    Attributes:
        sampa: the engine (`hf_sampa.engine.sampa.SAMPa` or `SAM`) of the training run in progress or just ended.

    Raises:
        ValueError: the world, the precision or the model cannot be used with SAMPa; see `hf_sampa.checks`.
    """

    sampa: SAMPa | SAM | None = None
    _means_wanted = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # What help() and whoever asks for a signature is told: the Trainer's below, and a recipe; or the class's own.
        cls.__signature__ = None
        if next(kind for kind in cls.__mro__ if "__init__" in vars(kind)) is SAMPaMixin:
            below = inspect.signature(_trainer_below(cls))
            own = inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Recipe | None")
            parameters = list(below.parameters.values())
            last = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
            parameters.insert(len(parameters) - bool(last), own)
            cls.__signature__ = below.replace(parameters=parameters)

    def __init__(self, *given, recipe: Recipe | None = None, **named):
        check_not_generating(type(self))
        given, named, args = self._with_arguments(given, named)
        args.mesh  # refuses odd worlds before anything is built  # noqa: B018
        try:
            super().__init__(*given, **named)
        except TypeError as error:
            if "unexpected keyword argument 'method'" not in str(error):
                raise
            raise self._foreign_arguments(args) from error  # TRL makes its own arguments of those that it is given
        if self.args is not args:
            raise self._foreign_arguments(args)
        check_recipe(recipe, args.variant)
        self._recipe = recipe
        check_trainer(self)
        self.card_facts, self._clock, self._evaluations, self.continued = CardFacts(), StepClock(), [], []
        if args.diagnostics_steps:
            self.add_callback(DiagnosticsCallback(self, args.diagnostics_steps))
        self._exchange: Exchange | None = None
        self._stream: UpdateStream | None = None
        self._means = RunningMeans()

    def _with_arguments(self, given: tuple, named: dict) -> tuple[tuple, dict, SAMPaArgumentsMixin]:
        """What the trainer was given, wherever its signature has the training arguments; with default ones, if it had none."""
        args = next((value for value in (*given, *named.values()) if isinstance(value, TrainingArguments)), None)
        if args is None and super().__init__.__func__ is Trainer.__init__:
            bound = inspect.signature(super().__init__).bind_partial(*given, **named)
            bound.arguments["args"] = args = SAMPaTrainingArguments("tmp_trainer")
            return bound.args, bound.kwargs, args
        if not isinstance(args, SAMPaArgumentsMixin):
            raise self._foreign_arguments(args)
        return given, named, args

    def _foreign_arguments(self, args) -> ValueError:
        below = _trainer_below(type(self))
        wanted = "SAMPaTrainingArguments, or a class of yours with SAMPaArgumentsMixin"
        if below is not Trainer:
            wanted = (
                f"a class of yours with SAMPaArgumentsMixin and the arguments of {below.__name__}, as in `@dataclass class "
                "MyArguments(SAMPaArgumentsMixin, ItsArguments): ...`"
            )
        return ValueError(f"args: expected {wanted}, got {'none' if args is None else type(args).__name__}.")

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

    def _inner_training_loop(self, *args, **kwargs):
        self._connect()
        with stood_in(self, "get_train_dataloader", partial(self._build_loader, self.get_train_dataloader)):
            return super()._inner_training_loop(*args, **kwargs)

    def _build_loader(self, build: Callable[[], Iterable]) -> Iterable:
        # Whoever builds a loader of his own asks how many processes share the data: the replicas of a role do.
        with self._exchange.role_world.lent():
            return build()

    def _connect(self) -> None:
        """Reach the other processes, if they are not reached yet."""
        if self._exchange is None or self._exchange.mesh != self.args.mesh:
            self._exchange = Exchange(self.args.mesh, timeout=timedelta(seconds=self.args.ddp_timeout))
        self._exchange.bytes_sent = 0

    def set_initial_training_values(self, args, dataloader):
        loader = replica_loader(dataloader, args.mesh, args.accelerator_config.split_batches, args.data_seed)
        recipe = self._recipe or args.recipe()
        self._loader = seeded_loader(loader, self._data_seed, recipe.reads_indices or recipe.mask.fisher_samples > 0)
        check_loader(self._loader, args)
        check_samplers(self._loader, args.mesh)
        return super().set_initial_training_values(args, self._loader)

    def get_total_train_batch_size(self, args) -> int:
        # Two ranks of a pair read one batch.
        return super().get_total_train_batch_size(args) * args.num_replicas // args.world_size

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _run_epoch(self, train_dataloader, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # A finished run, resumed: upstream would take a step before it asks.
            self.control.should_training_stop = True
            return
        self._pass_step, self._read_own = self.training_step, self.get_batch_samples
        if self._stream is None:
            self._open_stream(kwargs["epoch"], kwargs["steps_trained_in_current_epoch"])
        elif (ahead := self._stream.peek()) and (ahead.start or self._begun):
            # A callback ended the epoch early, maybe between micro-batches: the batch that comes next, or the one that had
            # begun, will not be trained on, and with it goes its g_t.
            self._stream.leave_epoch(self.state.global_step)
            if isinstance(self.sampa, SAMPa):
                self.sampa.forget()
        self._epoch_in_stream, _ = self._stream.position
        # The loop only iterates over and fast-forwards what it is given; `get_batch_samples` reads the stream.
        with stood_in(self, "training_step", self._step), stood_in(self, "get_batch_samples", self._next_batch):
            super()._run_epoch(train_dataloader=DataLoader([]), **kwargs)

    def _read_batch(self, iterator, num_batches) -> list:
        """The micro-batches of an update batch, by the class's own ``get_batch_samples``, read one step ahead of the loop."""
        samples, _ = self._read_own(iterator, num_batches, self.args.device)
        return samples

    def _next_batch(self, epoch_iterator, num_batches, device):
        """What the loop calls to get an update batch."""
        ahead = self._stream.peek()
        if ahead is None or ahead.epoch != self._epoch_in_stream:
            return [], None  # an epoch of unknown length, or all there is to read, is over
        with record_function("SAMPa.data"), self._exchange.role_world.lent():
            self._batch = self._stream.advance()
        samples = [micro_batch.inputs for micro_batch in self._batch]
        # A group that ends early without the loop's knowing still has to reach its optimizer step. Items are counted by
        # micro-batch, in `_weigh`.
        return samples + [{}] * (num_batches - len(samples)), None

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
        check_optimizer(self.optimizer.optimizer)
        others = other_modules(self, self.model)
        check_precision(Trained(self.optimizer.optimizer, self.model, others).named)
        if self.args.mesh.paired:
            check_groups({"model": self.model, **others})
        check_same_start(self._exchange, started_with(self, max_steps))
        self._prepare_steps(max_steps)
        self._exchange.broadcast([*self.sampa.params, *self.sampa.forward_state.tensors().values()])
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

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        before = self._globalstep_last_logged
        self._means_wanted = self.control.should_log and self.state.global_step > before
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._means_wanted = False
        if self._globalstep_last_logged != before:
            self._tr_loss.zero_()  # upstream takes it from itself, so that one NaN would stay for good

    def _finalize_training(self, *args, **kwargs):
        self.sampa.check_alike()  # the last step's have not been compared yet
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        # In Trainer's own line on the steps, not in one of somebody's that has a loss in it, too.
        if self._means_wanted and "loss" in logs:
            self._means_wanted = False
            logs.update(self._means.take())
        super().log(logs, *args, **kwargs)


def _trainer_below(kind: type) -> type[Trainer]:
    """The class that the mixin is put above."""
    return next(each for each in kind.__mro__ if issubclass(each, Trainer) and not issubclass(each, SAMPaMixin))


class SAMPaTrainer(SAMPaMixin, Trainer):
    """`transformers.Trainer` that trains with SAMPa or SAM; takes what Trainer takes, see `SAMPaMixin`."""
