"""SAMPa in `transformers.Trainer`: a mixin that hands the loop other batches and another step, and keeps everything else.

The loop stays Trainer's. It is handed the micro-batches of B_t one by one; with the last of them the step for B_t and B_{t+1}
runs (`hf_sampa.steps`, `hf_sampa.engine.sampa`) and leaves G_t in ``.grad``, where Trainer clips it, takes the base optimizer's
step, logs, evaluates and saves as always. The overrides are in the order in which Trainer calls them; each says why upstream's
is not enough. What lives as long as one call of ``train()`` is in `hf_sampa.run.Run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .cards import WithCard, texts_in, without_secrets
from .checkpoints import (
    as_any_other,
    as_saved,
    check_trained,
    contiguous,
    load_missing,
    load_weights,
    loading,
    no_weights,
    optimizer_as_saved,
    remove_no_weights,
    whole_weights,
)
from .checks import (
    check_aliases,
    check_dataset,
    check_entries,
    check_groups,
    check_model,
    check_not_generating,
    check_optimizer,
    check_precision,
    check_savable,
    check_trainer,
)
from .compat import (
    check_hooks,
    count_every_label,
    let_trainer_divide,
    numpy_by_both_names,
    one_process_saves,
    say_what_is_untested,
)
from .data import prepare_and_remember
from .distributed import check_same_start, end_with_launcher, peers_expected, units
from .engine import SAM, SAMPa, SharedGradScaler, Trained
from .evaluation import ExactEvalLoss
from .fsdp import (
    check_fsdp,
    check_sizes,
    check_version,
    name_layers,
    shard_within_role,
    sizes_asked_for,
    whole_for_data,
)
from .monitoring import WithDiagnostics
from .run import Run
from .start import started_with
from .state import other_modules, stood_in
from .training_args import SAMPaArgumentsMixin, SAMPaTrainingArguments
from .variants import OWN, Recipe, check_recipe, find


logger = get_logger(__name__)

check_hooks(Trainer)


class SAMPaMixin(ExactEvalLoss, WithCard, WithDiagnostics):
    """Sharpness-aware steps for any `Trainer`: ``class Mine(SAMPaMixin, SomeTrainer)``.

    Takes what the Trainer below it takes, in its order; `args` must be of a class with `SAMPaArgumentsMixin`. Started by one process
    it plays both roles in turn, by 2k processes it spreads them, with the same numbers.

    Args:
        recipe: what a step is made of, instead of the recipe of ``args.variant``; see `hf_sampa.variants.recipe`.

    Attributes:
        continued: sentences on parts of the run that were of other settings, or of plain Trainer.

    Raises:
        ValueError: the world, the precision or the model cannot be used with SAMPa; see `hf_sampa.checks`.
    """

    _run: Run | None = None
    _recipe: Recipe | None
    _means_wanted = False  # whether the next log line on the steps is to have their means
    _loading_from: str | None = None  # the folder whose weights are being loaded
    continued: list[str]

    # ---- A trainer is made ----

    def __init_subclass__(cls, **kwargs):
        """The signature is that of the Trainer below with a recipe, or the class's own: help() and TRL read it."""
        super().__init_subclass__(**kwargs)
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
        end_with_launcher()
        try:
            super().__init__(*given, **named)
        except TypeError as error:
            if "unexpected keyword argument 'method'" not in str(error):
                raise
            raise self._foreign_arguments(args) from error  # TRL makes its own arguments of those that it is given
        if self.args is not args:
            raise self._foreign_arguments(args)
        check_recipe(recipe, args.variant)
        check_trainer(self)
        count_every_label(self)
        say_what_is_untested()
        self._recipe, self.continued = recipe, []
        self._add_diagnostics()

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
        """Upstream's would average the two roles' gradients, and scale fp16's losses on each process by a scale of its own."""
        check_version(self.args)
        check_sizes(self.args)
        # A parallelism_config is that of a role's processes.
        with self.args.world_of_role() if sizes_asked_for(self.args) else nullcontext():
            super().create_accelerator_and_postprocess()
        check_fsdp(self)
        shard_within_role(self, self.args.mesh, self.args.ddp_timeout_delta)
        let_trainer_divide(self)
        accelerator = self.accelerator
        if accelerator.scaler is not None:
            accelerator.scaler = SharedGradScaler(accelerator.scaler, accelerator.device.type)
        # "evaluation mode" prepares autocast and compilation and leaves out DDP, which would average the two roles.
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
        for_data = partial(_prepare_for_data, accelerator, accelerator.prepare_data_loader)
        accelerator.prepare_data_loader = partial(prepare_and_remember, for_data)

    def _move_model_to_device(self, model, device):
        """Upstream's gives entries that share memory memory of their own, where the device has another name."""
        check_entries(model)
        check_aliases(model)
        super()._move_model_to_device(model, device)

    # ---- train() ----

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in Trainer; ``True`` takes the last whole checkpoint, where upstream takes the last folder, and names the others.

        Raises ValueError for a checkpoint that is torn, damaged, foreign, of a newer format or of another data stream or model.
        """
        self._gather_weights()
        before, self._run, state = self._run, Run(self, self._run), self.state
        try:
            resume_from_checkpoint = self._run.resume.find(resume_from_checkpoint)
            with peers_expected():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            if not self._run.ready and self.state is state:
                # Refused before upstream began: the last run's result stands.
                self._run = before
            elif not self._run.ready:
                # Upstream had begun, and the run had not: what there is belongs to none, and is not to be saved.
                self._run.make_room()
                self._run = None
            if self._run is not None:
                # What it had begun to send would reach the next run.
                self._run.exchange = None
                self._run.lose_parts()
            raise
        finally:
            if self._run is not None:
                self._run.leave()

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        """Upstream's leaves out weights whose names were saved in another form, with a warning at most."""
        self._loading_from = resume_from_checkpoint
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, *args, **kwargs)
        changed = self._run is not None and self._run.resume.weights_changed
        with as_saved(self, resume_from_checkpoint):
            load_weights(self.model, resume_from_checkpoint, load, changed)

    def _issue_warnings_after_load(self, load_result):
        """Upstream only warns of tensors that it did not load: here they are loaded."""
        load_missing(self.model, self._loading_from, load_result)
        if isinstance(self.model, PreTrainedModel):  # upstream's reads an attribute that others do not have
            super()._issue_warnings_after_load(load_result)

    def _inner_training_loop(self, *args, **kwargs):
        """Upstream builds a loader for all processes. Those that share the data are the replicas of a role."""
        self.args.check_settings()  # they may have changed since they were made
        build, world = self.get_train_dataloader, self._run.exchange.role_world

        def build_for_a_role():
            with world.lent():
                return build()

        with stood_in(self, "get_train_dataloader", build_for_a_role):
            return super()._inner_training_loop(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Upstream's samplers would refuse an empty dataset with less of a message."""
        check_dataset(self.train_dataset)
        return super().get_train_dataloader()

    def set_initial_training_values(self, args, dataloader):
        """Upstream's loader gives every process batches of its own: both roles of a pair read the same."""
        return super().set_initial_training_values(args, self._run.read_from(dataloader))

    def get_total_train_batch_size(self, args) -> int:
        """Two ranks of a pair read one batch."""
        return super().get_total_train_batch_size(args) * args.num_replicas // args.world_size

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """Upstream counts epochs by their nominal number of steps, which iterable datasets do not have."""
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return self._run.resume.begin_at(place, resume_from_checkpoint)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Upstream makes model and optimizer ready, and loads their states: the engine is built on them, and loads its own."""
        run, args = self._run, self.args
        check_model(self.model)
        check_savable(self)
        name_layers(self)
        run.make_room()
        self._card.begin()
        self.continued = []
        model, _ = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        optimizer, others = self.optimizer.optimizer, other_modules(self, self.model)
        check_optimizer(optimizer)
        check_precision(Trained(optimizer, self.model, others).named)
        if args.mesh.paired:
            check_groups({"model": self.model, **others})
        check_same_start(run.exchange, started_with(self, max_steps))
        run.begin(max_steps)
        self.callback_handler.train_dataloader = run.loader
        run.resume.take_up(resume_from_checkpoint)
        run.ready = True
        return model, run.loader

    def create_optimizer(self, *args, **kwargs):
        """Upstream knows no options that a variant asks for, as AdaSAM for amsgrad."""
        optimizer = super().create_optimizer(*args, **kwargs)
        options = {} if self._recipe else find(self.args.variant).optimizer
        for group in self.optimizer.param_groups:
            if missing := [name for name in options if name not in group]:
                raise ValueError(
                    f"optim: expected an optimizer with the option {', '.join(missing)} for variant {self.args.variant!r}, got "
                    f"{type(self.optimizer).__name__}. Set optim='adamw_torch'."
                )
            group.update({name: value for name, value in options.items() if value is not None})
        self._train_auxiliary()
        return optimizer

    def _train_auxiliary(self) -> None:
        """Let the base optimizer hold weights that the recipe has of its own, new in every run, in the place of those of a run before."""
        groups, before = self.optimizer.param_groups, vars(self).pop(OWN, None)
        for param in () if before is None else before.parameters():
            for group in groups:
                group["params"] = [each for each in group["params"] if each is not param]
            self.optimizer.state.pop(param, None)
        recipe = self._recipe or self.args.recipe()
        if self.is_fsdp_enabled:  # accelerate is to shard what the optimizer holds, and knows the model's alone
            recipe.check_shards(1)
        if (own := recipe.adapters.own(self.model, self.args.seed)) is not None:
            setattr(self, OWN, own.to(self.args.device))
            of_adapters = {id(param) for name, param in self.model.named_parameters() if "lora_" in name}
            with_adapters = (each for each in groups if any(id(param) in of_adapters for param in each["params"]))
            next(with_adapters, groups[0])["params"] += own.parameters()

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Upstream's names no file where one holds something else than it expects."""
        with loading(checkpoint, "optimizer.pt or scheduler.pt"), optimizer_as_saved(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    # ---- An epoch ----

    def _run_epoch(self, train_dataloader, **kwargs):
        """Upstream's reads its loader batch by batch, while a step needs the batch after it.

        For the epoch ``training_step`` and ``get_batch_samples`` are replaced by the run's: see `Run.epoch`.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # A finished run, resumed, or one that a callback ends before it begins: upstream would take a step before it asks.
            self.control.should_training_stop = True
            return
        self._run.epoch(super()._run_epoch, **kwargs)

    def _load_rng_state(self, checkpoint):
        """As in `_load_optimizer_and_scheduler`; and upstream's knows numpy's state by one of its two names."""
        with loading(checkpoint, "rng_state*.pth"), numpy_by_both_names():
            super()._load_rng_state(checkpoint)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Upstream's loss is the one that is asked for; a pass also notes it, and takes a variant's own or that of single samples."""
        if not self._in_pass:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self._run.steps.micro_batches.compute_loss(super().compute_loss, model, inputs, *args, **kwargs)

    @property
    def _in_pass(self) -> bool:
        steps = self._run and self._run.steps
        return steps is not None and steps.micro_batches.in_pass is not None

    def floating_point_ops(self, inputs) -> int:
        """Upstream counts one forward and backward pass; each role that this process plays is one, or, before `sampa_start`, half of one."""
        of_all = super().floating_point_ops(inputs) * len(self.args.mesh.roles)
        return of_all // 2 if self._run and self._run.steps and self._run.steps.is_plain else of_all

    def _track_num_input_tokens(self, inputs):
        """Upstream counts what each process reads: a pair reads one batch."""
        before = self.state.num_input_tokens_seen
        if inputs:  # a group that ends early is filled up with {}, see `Run._next_batch`
            super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted * self.args.num_replicas // self.args.world_size

    def _clip_grad_norm(self, model):
        """Upstream's would clip by the norm of the part that is here, where processes share an optimizer, or to 0 by one that is infinity."""
        if self.sampa.clips_itself:
            return self.sampa.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """As in `_clip_grad_norm`; and a skipped step has no gradient."""
        if grad_norm is None and self.sampa.clips_itself:
            grad_norm = self.sampa.grad_norm()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return float("nan") if self.sampa.skipped_in_a_row else norm

    # ---- After a step: log, evaluate, save ----

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """Means are logged beside the loss, and what was put off within the step is saved."""
        before = self._globalstep_last_logged
        self._means_wanted = self.control.should_log and self.state.global_step > before
        upstream = partial(super()._maybe_log_save_evaluate, tr_loss, grad_norm, model, trial, *args, **kwargs)
        self._run.saving.after_a_step(upstream, model, trial)
        self._means_wanted = False
        if self._globalstep_last_logged != before:
            self._tr_loss.zero_()  # upstream subtracts it from itself, so that one NaN would stay for good

    def log(self, logs, *args, **kwargs):
        """As in Trainer; the line on the steps also has their means, and what a pass logs waits until its step is through."""
        if self._in_pass:
            self._run.steps.micro_batches.log(logs, *args, **kwargs)
            return
        # In Trainer's own line on the steps, not in one of somebody's that has a loss in it, too.
        if self._means_wanted and "loss" in logs:
            self._means_wanted = False
            logs.update(self._run.to_log())
        self.log_of_a_pass(logs, *args, **kwargs)

    def log_of_a_pass(self, *given, **named) -> None:
        """Log what a pass has logged, once its step is through; a `log` of a subclass has seen it in the pass already."""
        with self._before_saving():
            super().log(*given, **named)

    def _evaluate(self, *args, **kwargs):
        """A callback may ask for a checkpoint in the evaluation: it waits for the save that is to come after it."""
        self._gather_weights()
        with self._before_saving():
            return super()._evaluate(*args, **kwargs)

    @property
    def _in_parts(self) -> bool:
        """Whether a checkpoint is being written in which every process has its parts of the weights."""
        return self._run is not None and self._run.saving.in_parts

    def _gather_weights(self) -> None:
        if self._run is not None:
            self._run.gather_weights()

    @contextmanager
    def _before_saving(self) -> Iterator[None]:
        if self._run is None:
            yield
            return
        with self._run.saving.before():
            yield

    def evaluate(self, *args, **kwargs):
        """As in Trainer. Raises as `predict` does."""
        self._gather_weights()
        with peers_expected():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As in Trainer. Raises PeerLost where another process does not answer; upstream's error would be gloo's."""
        self._gather_weights()
        with peers_expected():
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """Upstream's writes at once, into the checkpoint that is there, and knows nothing of g_t."""
        check_trained(self.sampa)
        if self._run.saving.is_put_off(trial):
            return
        upstream = partial(super()._save_checkpoint, model, trial)

        def write(folder, old):
            self._attempt("the card", partial(self._card.begin_checkpoint, folder, old))
            upstream()

        self._run.saving.checkpoint(trial, write)

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """`write`, so that what fails on one process within a checkpoint leaves none of the others waiting."""
        if self._run is None:
            write()
        else:
            self._run.saving.attempt(what, write)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As in Trainer. Raises RuntimeError within a step, when the model holds displaced weights."""
        if self._run is not None:
            self._run.saving.check_displaced()
        self._gather_weights()
        with as_any_other(self):
            super().save_model(output_dir, _internal_call)
            if one_process_saves(self) and not self.args.should_save and units(self.model) and not self._in_parts:
                whole_weights(self.model)
        if _internal_call and self.args.save_only_model:
            # Upstream then calls no `_save_rng_state`, which writes otherwise.
            self._run.saving.write(output_dir)

    def _save(self, output_dir=None, state_dict=None):
        """peft writes into a README.md that is there; training_args.bin would have the Hub's token; what is not contiguous is refused."""
        save = super()._save
        in_parts = self._in_parts
        if in_parts:
            state_dict = no_weights(self.model)
        elif units(self.model):
            state_dict = whole_weights(self.model)
        elif state_dict is None and not hasattr(self.model, "save_pretrained"):
            state_dict = contiguous(self.model.state_dict())

        def write():
            with self._card.kept(output_dir), without_secrets(self.args):
                save(output_dir, state_dict)
            if in_parts and self.args.should_save:
                remove_no_weights(Path(output_dir))

        self._attempt("the weights", write)

    def _save_optimizer_and_scheduler(self, output_dir):
        """Rank 0 writes what, with a shared optimizer, is in several processes, unless all of them write what they have."""
        write = partial(super()._save_optimizer_and_scheduler, output_dir)
        if self._run.saving.in_parts:
            self._run.saving.write_parts(write, output_dir)
            return
        with self.sampa.placement.whole_optimizer(), as_any_other(self):
            self._attempt("the optimizer", write)

    def _save_rng_state(self, output_dir):
        """The last that Trainer writes before trainer_state.json: see `hf_sampa.checkpoints.checkpoint` for why SAMPa's states come then."""
        self._attempt("the random state", partial(super()._save_rng_state, output_dir))
        self._run.saving.write(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Upstream's pushes no card of the whole run, and the Hub's token, and says nothing of a push that fails; it comes too early."""
        upstream = partial(super()._push_from_checkpoint, checkpoint_folder)

        def push():
            with without_secrets(self.args):
                if self.is_world_process_zero():
                    self._card.push(upstream)
                else:
                    upstream()

        self._run.saving.later(push)

    # ---- The end ----

    def _finalize_training(self, *args, **kwargs):
        """Processes compare their weights in the step after; there is none after the last. Upstream loads the best where it is."""
        self._gather_weights()
        self.sampa.check_alike()
        self._run.resume.agree_on_best()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self):
        """As in `_load_from_checkpoint`; and buffers and weights beside the model's belong to the best step, too."""
        self._loading_from = self.state.best_model_checkpoint
        with as_saved(self, self.state.best_model_checkpoint):
            self._run.resume.load_best(super()._load_best_model)

    def init_hf_repo(self, *args, **kwargs):
        """All arguments will be pushed, those of a class of somebody's, too."""
        super().init_hf_repo(*args, **kwargs)
        if texts := texts_in(self.args):
            logger.warning(
                f"training_args.bin, which is pushed, holds the training arguments, with None for what has the name or the look of a "
                f"secret. {', '.join(texts)} will be in it as given: take out what is not for everybody."
            )

    # ---- To be asked, by callbacks perhaps ----

    @property
    def sampa(self) -> SAMPa | SAM | None:
        """The engine of the run in progress or just ended; None before the first."""
        return None if self._run is None else self._run.engine

    @property
    def seconds_per_step(self) -> float | None:
        """From the batch to the update, without evaluation, saving and callbacks; None before the first step."""
        return None if self._run is None else self._run.clock.mean

    def first_sharp_step(self) -> int:
        """t of the run's first sharpness-aware step; so many steps come before it."""
        if self._run is None or self._run.steps is None:
            return self.args.first_sharp_step(self.state.max_steps)
        return self._run.steps.start

    def unlogged_means(self) -> dict[str, float]:
        """Means over the steps since the last log line, by the names that they are logged under."""
        return self._run.means.means() if self._run else {}

    def lookahead_error(self) -> tuple[float, float] | None:
        """As in `SAMPa.lookahead_error`, of the batch that is about to be trained on; None for sequential methods, or without one."""
        return None if self.sampa is None or self._run.batch is None else self._run.steps.lookahead_error()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around code of a callback that computes a loss: its world is a pass's, and it leaves nothing on the trainer. Within a run."""
        self._gather_weights()
        with nullcontext() if self.sampa is None else self._run.steps.micro_batches.aside():
            yield


def _prepare_for_data(accelerator: Accelerator, prepare: Callable, *args, **kwargs) -> DataLoader:
    """What `prepare` makes of a loader, shared out among all processes."""
    with whole_for_data(accelerator):
        return prepare(*args, **kwargs)


def _trainer_below(kind: type) -> type[Trainer]:
    """The class that the mixin is put above."""
    return next(each for each in kind.__mro__ if issubclass(each, Trainer) and not issubclass(each, SAMPaMixin))


class SAMPaTrainer(SAMPaMixin, Trainer):
    """`transformers.Trainer` that trains with SAMPa or SAM; takes what Trainer takes, see `SAMPaMixin`."""
