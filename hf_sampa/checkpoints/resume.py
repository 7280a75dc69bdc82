"""How a run goes on: Trainer's checkpoints taken up exactly, recognisably whole, and loaded to the last tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel, TrainerState

from ..cards import Evaluation, changes
from ..data import Place
from ..distributed import here, part_of
from ..engine import SAMPa
from ..state import make_room
from . import checkpoint, content, in_parts
from .in_parts import G_T, Unfit
from .manifest import Manifest
from .replaced import restore, restore_all
from .saved_weights import holds, left_out, load_every_tensor, other_model
from .whole import is_weights, weights_in


if TYPE_CHECKING:
    from ..run import Run

logger = get_logger(__name__)

# What a checkpoint without a word on it was written with.
BEFORE_VARIANTS = {"variant": "sam", "variant_args": {}}


class Resume:
    """What a run takes up from the checkpoint that it goes on from, if it goes on from one.

    Args:
        run: which.

    Attributes:
        start: epoch, and micro-batches of it, where the run begins.
        unlogged: sums that the next log line takes up.
        changes: what is wrong with files of the checkpoint, by their names, where that is to be ignored.
    """

    def __init__(self, run: Run):
        self.run, self.trainer = run, run.trainer
        self.start: tuple[int, int] = (0, 0)
        self.unlogged: dict[str, Any] | None = None
        self.changes: dict[str, str] = {}
        self._expected: list[int] | None = None  # fingerprints of the next update batch

    def find(self, given: str | bool | None) -> str | None:
        """A whole checkpoint, after putting back what a process that was killed had moved aside; None for none. A collective.

        Raises ValueError for one that is torn, damaged, or of a newer format, and where only some processes are to go on from one.
        """
        asked = [
            each or None for each in self.run.exchange.share_objects(given if given is True else given and str(given))
        ]
        kinds = [each if each in (None, True) else "a path" for each in asked]
        if len(set(kinds)) > 1:
            rank = next(rank for rank, kind in enumerate(kinds) if kind != kinds[0])
            raise ValueError(
                f"resume_from_checkpoint: expected the same on every process, but got {asked[0]!r} on rank 0 and {asked[rank]!r} on "
                f"rank {rank}."
            )
        if not given:
            return None
        args, output_dir = self.trainer.args, Path(self.trainer.args.output_dir)
        if args.should_save:
            with suppress(OSError):  # of a folder that is read only; what is found there is inspected
                restore_all(output_dir) if given is True else restore(Path(given).absolute())
        self.run.exchange.meet()
        if given is not True:
            self._inspect(Path(given))
            return str(given)
        names = self.run.exchange.share_objects(checkpoint.steps_in(output_dir))[0]
        folder, problems = checkpoint.last_whole(output_dir, names, self._inspect)
        for problem in problems:
            logger.warning(f"Passing over a checkpoint. {problem}")
        return str(folder)

    def _inspect(self, folder: Path, counts: Callable[[str], bool] = lambda name: True) -> None:
        """`checkpoint.inspect`, by one process of every machine, with the same end on all of them. A collective."""
        args = self.trainer.args
        problem, changes = None, {}
        if args.local_process_index == 0:
            try:
                changes = checkpoint.inspect(folder, args.ignore_changed_files, counts)
            except ValueError as error:
                problem = str(error)
        of_all = self.run.exchange.share_objects((problem, changes))
        if problems := [problem for problem, _ in of_all if problem]:
            raise ValueError(problems[0])
        self.changes = {name: each for _, changes in of_all for name, each in changes.items()}
        if self.changes:
            logger.warning(
                f"ignore_changed_files: {folder} is not as it was written, and is taken as it is: {checkpoint.listed(self.changes)}."
            )

    @property
    def weights_changed(self) -> bool:
        """Whether the files of weights are not those that were written."""
        return any(map(is_weights, self.changes))

    def begin_at(self, place: tuple[int, int], folder: str | None) -> tuple[int, int]:
        """Where the data go on: Trainer's `place`, or what the checkpoint in `folder` says."""
        found = checkpoint.read(Path(folder)) if folder else None
        if found is not None and not self.trainer.args.ignore_data_skip:
            # Upstream counts epochs by their nominal number of steps, which iterable datasets do not have.
            place = found.position.epoch, found.position.start
        self.start = place
        return place

    def take_up(self, folder: str | None) -> None:
        """Begin at `start`, with the engine's state from the checkpoint in `folder`, if any.

        Raises ValueError for a checkpoint of another data stream, variant, optimizer or model.
        """
        run, trainer, args = self.run, self.trainer, self.trainer.args
        self.unlogged = self._expected = None
        run.place = Place(*self.start)
        if folder is None:
            return
        found = checkpoint.read(Path(folder))
        if found is None:
            self._check_optimizer(folder, None)
            logger.warning(
                f"{folder} holds no state of SAMPa, as plain Trainer leaves it: g_t is computed at its weights."
            )
            trainer.continued = [f"steps 1 to {_steps_of(folder)} were plain Trainer's"]
            return
        only_weights = found.kept == "weights"
        if not only_weights:
            self._check_optimizer(folder, found.optimizer)
            self._check_variant(folder, found)
        self._check_stream(folder, found)
        for difference in checkpoint.changed(found.settings, content.settings(run)):
            logger.warning(f"Resuming with a changed setting, {difference}.")
        trainer.continued = [*found.continued, *self._other_settings(folder, found), *self._other_files(folder)]
        trainer._card.evaluations = [Evaluation(**vars(each)) for each in found.evaluations]
        run.engine.skipped_steps, run.engine.skipped_in_a_row = found.skipped.steps, found.skipped.in_a_row
        run.steps.go_on(found.plain_steps, trainer.state.global_step)
        self.unlogged = asdict(found.unlogged)
        self._load_beside(folder, found)
        if not args.ignore_data_skip:
            self._expected = found.position.fingerprints
            run.place = Place(*self.start, self._expected and self._expected[args.mesh.replica])
        if only_weights:
            self._begin_anew(folder)
        else:
            self._carry_on(folder, found)

    def _carry_on(self, folder: str, found: Manifest) -> None:
        """What the step and the trainer's own code remember, and g_t."""
        run, args = self.run, self.trainer.args
        parts = in_parts.read(Path(folder), dict(zip(run.engine.names, run.engine.params, strict=True)))
        grads = parts.pop(G_T, None) or checkpoint.read_tensors(Path(folder))
        recipe = checkpoint.read_state(Path(folder), checkpoint.RECIPE)
        run.engine.load_recipe_state(in_parts.put_back(recipe, parts, run.engine.names))
        of_replicas = checkpoint.read_state(Path(folder), checkpoint.COLLECTED).get("of_replicas")
        if of_replicas:
            run.steps.collected.load_state_dict(of_replicas[min(args.mesh.replica, len(of_replicas) - 1)])
        if args.ignore_data_skip:
            logger.warning("ignore_data_skip: the stream starts its epoch anew, and g_t is computed there.")
        elif isinstance(run.engine, SAMPa):
            run.engine.load_state_dict(grads, found.ascent and asdict(found.ascent))

    def _begin_anew(self, folder: str) -> None:
        """All but the weights, where nothing but the weights was kept."""
        logger.warning(
            f"{folder} holds the weights alone, as save_only_model=True leaves it: the optimizer, its schedule and g_t start anew."
        )
        self.trainer.continued += [
            f"steps 1 to {_steps_of(folder)} were SAMPa's, of which only the weights were kept: optimizer, schedule and "
            "g_t began anew after them"
        ]

    def _load_beside(self, folder: str, found: Manifest) -> None:
        """What moves and what is trained besides the model's weights."""
        engine = self.run.engine
        state, names = engine.forward_state, engine.names[engine.of_model :]
        if found.moving is None:  # written before it was known what forward moves
            model = self.trainer.model
            state.moving |= {name for name, _ in model.named_buffers() if name in model.state_dict()}
            if names:
                logger.warning(f"{folder} holds no weights of {', '.join(names)}, which start anew.")
            return
        try:
            state.load_state_dict(checkpoint.read_tensors(Path(folder), checkpoint.FORWARD_STATE))
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"Expected the modules that {folder} was written with, but one whose buffers it holds is not there: {error}. "
                "Resume with the model and the loss of the checkpoint's run. What the first pass makes is to be made before train()."
            ) from error
        saved = checkpoint.read_tensors(Path(folder), checkpoint.OTHERS)
        own = dict(zip(names, engine.params[engine.of_model :], strict=True))
        if differing := sorted(
            name
            for name in saved | own
            if name not in saved or name not in own or saved[name].shape != own[name].shape
        ):
            raise ValueError(
                f"Expected the weights besides the model's that {folder} was written with, but {', '.join(differing)} is not in "
                "both, or has another shape. Resume with the loss of the checkpoint's run."
            )
        with torch.no_grad():
            for name, param in own.items():
                here(param).copy_(part_of(saved[name], param))

    # ---- Is it this run's? ----

    def _check_stream(self, folder: str, found: Manifest) -> None:
        differing = checkpoint.changed(found.stream, content.stream_settings(self.run))
        if differing and not self.trainer.args.ignore_data_skip:
            raise ValueError(
                f"Expected the data stream that {folder} was written with, but it changed: {'; '.join(differing)}. "
                "Resume with the old values, set ignore_data_skip=True to start the epoch anew with a new g_t, or start a new run "
                "from these weights."
            )
        for difference in differing:
            logger.warning(f"Resuming with another data stream, {difference}.")

    def _check_variant(self, folder: str, found: Manifest) -> None:
        if differing := checkpoint.changed(found.recipe or BEFORE_VARIANTS, content.recipe_settings(self.run)):
            raise ValueError(
                f"Expected the variant that {folder} was written with, but it changed: {'; '.join(differing)}. Resume with "
                "the old one, or start a new run from these weights."
            )

    def _check_optimizer(self, folder: str, wrote: str | None) -> None:
        """Raise ValueError where the loaded state is another optimizer's; by its options, where the checkpoint does not say."""
        optimizer, own = self.trainer.optimizer.optimizer, content.optimizer_name(self.run)
        wrote = wrote or own
        # torch adds `differentiable` to the defaults afterwards.
        missing = optimizer.defaults.keys() - optimizer.param_groups[0].keys() - {"differentiable"}
        if wrote != own or missing:
            raise ValueError(
                f"Expected the state of {own} in {folder}, but it is that of {wrote if wrote != own else 'another optimizer'}. "
                "Resume with the old optim, or start a new run from these weights."
            )

    def _other_settings(self, folder: str, found: Manifest) -> list[str]:
        """A sentence on what is computed otherwise from here on; nothing where all is as it was."""
        # Not in checkpoints of earlier versions.
        differing = changes(self.trainer, found.computation) if found.computation else []
        after = f"continued after step {_steps_of(folder)} with other settings"
        return [f"{after}: {'; '.join(differing)}"] if differing else []

    def _other_files(self, folder: str) -> list[str]:
        """A sentence on what somebody has put in the place of files of the checkpoint."""
        named = ", ".join(self.changes)
        return [f"continued after step {_steps_of(folder)} from files that were changed: {named}"] if named else []

    # ---- The first batch ----

    def at_the_first_batch(self) -> None:
        """Take up the sums since the last log line. Raises ValueError where the batch is not the one that was to come."""
        run, trainer = self.run, self.trainer
        if self._expected is not None:
            found = content.fingerprints(run, run.next_place())
            if found != self._expected:
                raise ValueError(
                    "Expected the next update batch to be the one that the checkpoint's run would have read, with "
                    f"fingerprints {self._expected}, but got {found}: the training data, its order or its processing "
                    "changed, or draws from generators of its own. Resume with the old data, or set ignore_data_skip=True to "
                    "start the epoch anew."
                )
        if self.unlogged:
            # `_total_loss_scalar` counts this call's steps only, so what came before is taken out again.
            trainer._tr_loss += self.unlogged["loss"]
            trainer._total_loss_scalar -= self.unlogged["loss"]
            trainer._globalstep_last_logged = self.unlogged["since_step"]
            run.means.load_state_dict(self.unlogged["means"])
        self.unlogged = None

    # ---- The best weights ----

    def agree_on_best(self) -> None:
        """All processes load the best weights, or none does. A collective.

        Raises ValueError where they are damaged, or only some processes have them.
        """
        state = self.trainer.state
        best = self.run.exchange.share_objects(state.best_model_checkpoint)[0]
        if not self.trainer.args.load_best_model_at_end or best is None:
            return
        state.best_model_checkpoint = best
        there = self.run.exchange.share_objects(bool(weights_in(Path(best))))
        if not any(there):
            return  # upstream says so
        if not all(there):
            raise ValueError(
                f"load_best_model_at_end: expected {best} on every process, but rank {there.index(False)} has no weights there. Let "
                "all machines write to one disk. The model holds the weights of the last step."
            )
        try:
            self._inspect(Path(best), lambda name: is_weights(name) or name == checkpoint.TENSORS)
        except ValueError as problem:
            words = str(problem).removesuffix(checkpoint.ELSEWHERE)
            raise ValueError(
                f"load_best_model_at_end: {words}The model holds the weights of the last step."
            ) from problem

    def load_best(self, load: Callable[[], None]) -> None:
        """The best checkpoint's weights by Trainer's `load`, and what else belongs to them."""
        trainer = self.trainer
        best = trainer.state.best_model_checkpoint
        make_room(trainer.model, checkpoint.read_tensors(Path(best), checkpoint.FORWARD_STATE))
        load()
        if not Path(best).is_dir():
            return  # upstream says so
        if not self.weights_changed and lacks_weights_of(trainer.model, best):
            trainer._load_from_checkpoint(best)  # some trainers log what fails there, and go on
        found = checkpoint.read(Path(best))
        if found is not None and found.moving is not None:
            self._load_beside(best, found)


@contextmanager
def loading(folder: str | None, names: str) -> Iterator[None]:
    """Around Trainer's loading of files `names` in `folder`. Raises ValueError where they hold something else than it expects."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint {folder} cannot be loaded: {names} holds another state than that of this run "
            f"({type(error).__name__}: {error}). {checkpoint.ELSEWHERE}"
        ) from error


def load_weights(model: torch.nn.Module, folder: str, load: Callable[[], None], changed: bool = False) -> None:
    """Weights in `folder` by Trainer's `load`, to the last tensor; to the last bit, unless their files were `changed` on purpose.

    Raises ValueError where that cannot be had.
    """
    make_room(model, checkpoint.read_tensors(Path(folder), checkpoint.FORWARD_STATE))
    try:
        with in_parts.checked():
            load()
    except (RuntimeError, Unfit) as error:
        raise ValueError(
            other_model(model, folder)
            or f"The weights in {folder} are of another model: {error} Resume with the model that wrote it."
        ) from error
    if changed:
        return
    if isinstance(model, PreTrainedModel) and lacks_weights_of(model, folder):
        load_every_tensor(model, folder)
    if lacks_weights_of(model, folder):
        raise ValueError(
            f"Expected the model to hold the weights that were saved in {folder}, but after loading it holds "
            "others: the files were changed, or have not every tensor that is trained, as weights beside peft's adapters that "
            "are not in modules_to_save. Resume from another checkpoint, or load these weights into the model of a new run."
        )


def lacks_weights_of(model: torch.nn.Module, folder: str) -> bool:
    """Whether `model` holds other weights than those that were saved in `folder`."""
    recorded = checkpoint.recorded_weights(Path(folder))
    return recorded is not None and not holds(model, recorded)


def load_missing(model: torch.nn.Module, folder: str, load_result: Any) -> None:
    """What Trainer's loading left out, as `load_result` says."""
    if set(load_result.missing_keys) - left_out(model) or load_result.unexpected_keys:
        load_every_tensor(model, folder)


def _steps_of(folder: str) -> int:
    return TrainerState.load_from_json(str(Path(folder) / checkpoint.TRAINER_STATE)).global_step
