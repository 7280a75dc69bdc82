"""When a run is saved: by the loop, in any callback, by hand before, during and after it, after an interrupt, on SIGTERM.

A checkpoint of step N is what the loop holds between two steps. Asked for then, it is written at once; within a step, or while
the step's log line and evaluation are still to come, it is put off until they are through. What cannot be exact says so. One
that cannot be written, because the disk is full for instance, is given up by all processes, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.trainer as upstream
from accelerate.logging import get_logger

from ..distributed import PeerLost, peers_expected
from ..engine import SAM, SAMPa
from ..state import stood_in
from . import checkpoint, dcp, in_parts
from .content import to_save
from .replaced import replacing
from .whole import needed_in
from .writing import NotSaved, Writing, room


if TYPE_CHECKING:
    from ..run import Run

logger = get_logger(__name__)

# Of Trainer's state.
BEST = ("best_model_checkpoint", "best_global_step", "best_metric")
# What transformers' save on SIGTERM leaves in the folder that it makes beforehand.
ANNOUNCED = "checkpoint-is-incomplete.txt"


class Saving:
    """When a run is saved, and that a checkpoint is of one step.

    Args:
        run: which.
    """

    def __init__(self, run: Run):
        self.run, self.trainer = run, run.trainer
        self._saves_next = False  # what the loop does next is save, if it does
        # A checkpoint, and the end of the training, that were asked for within a step.
        self._put_off = self._stop_put_off = False
        self._content: dict[str, Any] | None = None  # what is written, while a checkpoint is, by a process that writes
        self._spread: in_parts.Spread = {}  # and by all together
        self.in_parts = False  # whether the checkpoint that is being written is
        self._writing: Writing | None = None  # while a checkpoint is written
        self._into, self._there = Path(), set()  # its folder, and files that are there already
        self._size = 0  # of the last one
        self._later: list[Callable[[], None]] = []  # what comes when it is whole
        self._best: dict[str, Any] = {}  # what Trainer knew of the best weights before this step's evaluation
        self._saved = True  # whether the last one was
        self._counted: tuple[int, float, float] | None = None  # see `note_counts`

    # ---- The loop comes by ----

    def end_epoch(self, on_epoch_end: Callable, *args):
        """The event at which the epoch's log line, evaluation and save are still to come."""
        self.run.stage = "before saving"
        return on_epoch_end(*args)

    def after_a_step(self, log_save_evaluate: Callable[[], None], model, trial) -> None:
        """Around what the loop does after a step: what was put off is saved with it."""
        trainer = self.trainer
        self._agree_on_ending()
        self.run.stage, self._saves_next = "between", True
        events = trainer.callback_handler
        self._note_best()
        try:
            with stood_in(events, "on_save", partial(self._on_save, events.on_save)):
                log_save_evaluate()
                if (
                    self._put_off
                ):  # another process asked for it, or an evaluation decided anew, by save_strategy="best"
                    trainer._save_checkpoint(model, trial)
                    trainer.control = events.on_save(trainer.args, trainer.state, trainer.control)
        finally:
            self._saves_next = False

    def _on_save(self, on_save: Callable, args, state, control):
        """The event that tells of a checkpoint, if there is one."""
        if self._saved:
            return on_save(args, state, control)
        control.should_save = False
        return control

    @contextmanager
    def before(self) -> Iterator[None]:
        """Around what the loop does after a step and before it saves."""
        stage = self.run.stage
        self.run.stage = "before saving" if self._saves_next else stage
        try:
            yield
        finally:
            self.run.stage = stage

    def leave(self) -> None:
        """The run is over."""
        self._put_off = self._stop_put_off = self._saves_next = False

    # ---- Now or later ----

    def is_put_off(self, trial) -> bool:
        """Whether a checkpoint is to wait until the step is through; takes note of it then."""
        run, args, control = self.run, self.trainer.args, self.trainer.control
        within = run.active and run.stage != "between"
        # On SIGTERM the processes ask at different moments, each on its own.
        alone = args.enable_jit_checkpoint and args.world_size > 1 and run.in_epoch and not self._saves_next
        if not (within or alone):
            return False
        logger.warning("A checkpoint was asked for within a step: it is saved at the end of the step, which is exact.")
        self._put_off = control.should_save = True
        if alone:
            self._stop_put_off = self._stop_put_off or control.should_training_stop
            control.should_training_stop = False
        folder = self._folder(trial)
        (folder / ANNOUNCED).unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or something is in it
            folder.rmdir()
        return True

    def _agree_on_ending(self) -> None:
        """On SIGTERM all processes save and stop after the same step. A collective."""
        args, control = self.trainer.args, self.trainer.control
        if not (args.enable_jit_checkpoint and args.world_size > 1):
            return
        own = torch.tensor([self._put_off, self._stop_put_off], device=args.device).long()
        self._put_off, stop = self.run.exchange.gather(own).any(dim=0).tolist()
        self._stop_put_off = False
        control.should_training_stop = control.should_training_stop or stop

    def _folder(self, trial) -> Path:
        return Path(self.trainer._get_output_dir(trial)) / f"checkpoint-{self.trainer.state.global_step}"

    def check_displaced(self) -> None:
        """Raise RuntimeError where the model holds displaced weights, which are not to be saved."""
        if self.run.active and self.run.stage == "in passes":
            raise RuntimeError(
                "save_model: expected to be called between two steps, but within a step the model holds displaced weights. Call "
                "it in a callback, or set control.should_save = True, by which the loop saves after the step."
            )

    # ---- Writing ----

    def checkpoint(self, trial, write: Callable[[Path, Path | None], None]) -> None:
        """Let Trainer `write` a checkpoint into its folder, while the one that it replaces, if there is one, is in another.

        All that can be refused is refused before anything is written. Of what the disk does not take nothing is left, and the
        run goes on. Raises NotSaved where there is none that could.
        """
        self.run.reach_others()
        self.run.gather_weights()
        folder = self._folder(trial)
        parts = in_parts.wanted(self.trainer)
        self._content, self._spread = to_save(self.run, folder, parts)
        self._into, self._there, self._later = folder, set(), []
        self._writing, self._saved, self.in_parts = Writing(self.run.exchange), False, parts
        try:
            with peers_expected(), self._as_before_the_step(), ExitStack() as replaced:
                old = self.attempt("the folder", lambda: self._make_way(folder, replaced))
                self._writing.agree()  # the others write into the folder, once the old one is out of the way
                with self._put_last(folder):
                    write(folder, old)
                self._writing.agree()  # before any older one is removed
            self._saved = True
        except PeerLost:
            raise
        # Whatever it is: it is raised again, unless the disk did not take a file, once the others know of it.
        except Exception as error:
            problem = self._writing.agree_on(error)
            self._forget_best()
            self._give_up(folder, problem)
        finally:
            self._content = self._writing = None
            self._spread, self.in_parts = {}, False
        self._put_off = False
        if self._saved:
            self._do_what_is_left(folder)

    def _make_way(self, folder: Path, replaced: ExitStack) -> Path | None:
        return replaced.enter_context(replacing(folder)) if self.trainer.args.should_save else None

    def attempt(self, what: str, write: Callable[[], Any]) -> Any:
        """`write` what belongs to a checkpoint, if one is being written, or something else: see `Writing.attempt`."""
        if self._writing is None:
            return write()
        found = self._writing.attempt(what, write)
        if self._content is not None and self._into.is_dir():
            self._there.update(needed_in(self._into))
        return found

    def together(self, what: str, write: Callable[[], Any], *folders: Path) -> None:
        """`attempt`, of what all processes write together into `folders`: they begin only if all of them can. A collective."""
        self.attempt(what, lambda: [each.mkdir(parents=True, exist_ok=True) for each in folders])
        self._writing.agree()
        self.attempt(what, in_parts.as_one_error()(write))

    def write_parts(self, write: Callable[[], None], output_dir: str) -> None:
        """Let Trainer `write` weights and optimizer as all processes hold them. A collective."""
        folders = [Path(output_dir) / name for name in (dcp.MODEL, dcp.OPTIMIZER)]
        with in_parts.with_state(self.trainer.optimizer.optimizer):
            self.together("weights and optimizer", write, *folders)

    def write(self, output_dir: str) -> None:
        """Add SAMPa's states to what Trainer has written, if a checkpoint is being written, and see whether all processes could."""
        if self._writing is None:
            return
        folder = Path(output_dir)
        if self._spread:
            self.together("SAMPa's tensors", partial(in_parts.write, folder, self._spread), folder / dcp.OWN)
        if self._content is not None:
            tensors, states = self._content["tensors"], self._content["states"]
            self.attempt("SAMPa's state", lambda: checkpoint.write_states(folder, tensors, states))
        self._writing.agree()

    @contextmanager
    def _put_last(self, folder: Path) -> Iterator[None]:
        """Within the block Trainer's last file is followed by the manifest, and the removal of older checkpoints waits."""
        state = self.trainer.state

        def finish(save_to_json: Callable[[str], None], file: str) -> None:
            save_to_json(file)
            checkpoint.write_manifest(folder, self._content["content"], self._there)
            self._size = sum(file.stat().st_size for file in folder.rglob("*"))

        def rotate(remove_older: Callable[..., None], **given) -> None:
            self.later(partial(_remove_older, remove_older, folder, **given))

        with (
            stood_in(state, "save_to_json", partial(finish, state.save_to_json)),
            stood_in(upstream, "rotate_checkpoints", partial(rotate, upstream.rotate_checkpoints)),
        ):
            yield

    def later(self, act: Callable[[], None]) -> None:
        """`act` when the checkpoint that is being written is whole on all processes; at once, if none is."""
        if self._writing is None:
            act()
        else:
            self._later.append(act)

    def _do_what_is_left(self, folder: Path) -> None:
        for act in self._later:
            try:
                act()
            except OSError as problem:
                logger.error(f"{folder} is saved, but what comes after it failed: {problem}. The run goes on.")

    def _note_best(self) -> None:
        """Before an evaluation that may find a better one."""
        state = self.trainer.state
        self._best = {name: getattr(state, name) for name in BEST}

    def _forget_best(self) -> None:
        """The best weights are not those of a checkpoint that is not there."""
        state = self.trainer.state
        if self._best and state.best_global_step == state.global_step:
            for name, value in self._best.items():
                setattr(state, name, value)

    def _give_up(self, folder: Path, problem: NotSaved) -> None:
        """Say what could not be written. A collective. Raises NotSaved where no run goes on."""
        rest, optimizers = zip(*self.run.exchange.share_objects(self._bytes()), strict=True)
        engine = self.run.engine
        moments = sum(optimizers) // engine.weights.count if engine.placement.shared else max(optimizers)
        needed = max(max(rest) + moments, self._size)
        words = f"{folder} could not be saved, and nothing of it is left: {problem}. It needs at least {needed:,} bytes{room(folder)}."
        if not self.run.active:
            raise NotSaved(words) from problem
        logger.error(f"{words} The run goes on, and the next save tries again.")

    def _bytes(self) -> tuple[int, int]:
        """What is large in a checkpoint: weights and SAMPa's tensors, and the optimizer's that are here."""
        own = [*(self._content["tensors"].values() if self._content is not None else ()), *self._spread.values()]
        weights = self.trainer.model.state_dict().values()
        tensors = [each for several in (weights, *(each.values() for each in own)) for each in several]
        states = self.trainer.optimizer.optimizer.state.values()
        moments = [each for state in states for each in state.values() if isinstance(each, torch.Tensor)]
        return tuple(sum(getattr(each, "nbytes", 0) for each in several) for several in (tensors, moments))

    # ---- Counts: micro-batches that were counted, but not trained on yet ----

    def note_counts(self) -> None:
        """Take note of tokens and operations (new, all) that were counted before the step that begins."""
        self._counted = (
            self.trainer.state.num_input_tokens_seen,
            self.trainer.current_flos,
            self.trainer.state.total_flos,
        )

    def take_back_counts(self) -> None:
        """Of a step that has begun, and will not be taken."""
        trainer = self.trainer
        if self.run.begun and self._counted is not None:
            trainer.state.num_input_tokens_seen, flos, total = self._counted
            trainer.current_flos = flos if trainer.state.total_flos == total else trainer.current_flos

    @contextmanager
    def _as_before_the_step(self) -> Iterator[None]:
        """Within the block the run has counted what steps that are through have read, and nothing else."""
        if not self.run.begun or self._counted is None:
            yield
            return
        trainer, before = self.trainer, self._counted
        tokens, flos = trainer.state.num_input_tokens_seen, trainer.current_flos
        trainer.state.num_input_tokens_seen, trainer.current_flos, _ = before
        try:
            yield
        finally:
            kept = trainer.current_flos  # none, where saving has added them to the state's
            trainer.state.num_input_tokens_seen, trainer.current_flos = tokens, flos - before[1] + kept
            self._counted = before[0], kept, trainer.state.total_flos


def check_trained(engine: SAMPa | SAM | None) -> None:
    """Raise RuntimeError where there is no run to be saved."""
    if engine is None:
        raise RuntimeError(
            "Expected a run whose checkpoint could be saved, but nothing was trained yet, or the last call of train() was refused. "
            "Call train() first; save_model() saves the weights alone."
        )


def _remove_older(remove_older: Callable[..., None], folder: Path, output_dir: str, **given) -> None:
    """Trainer's removal of older checkpoints, if `folder`, the one just saved, is the last by its order.

    That goes by time or number. A damaged one that was passed over may be the last by both, and would be kept in its place.
    """
    in_order = upstream.sort_checkpoints(output_dir, use_mtime=given.get("use_mtime", False))
    if in_order[-1:] == [str(folder)]:
        remove_older(output_dir=output_dir, **given)
