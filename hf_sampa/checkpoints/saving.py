"""Saving a run at any moment: by the loop, in any callback, by hand before, during and after it, after an interrupt, on SIGTERM.

A checkpoint of step N is what the loop holds between two steps. Asked for then, it is written at once; within a step, or while
the step's log line and evaluation are still to come, it is put off until they are through. What cannot be exact says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger

from ..cards import bound, computation, plain
from ..data import UpdateBatch, UpdateStream
from ..distributed import Exchange
from ..engine import SAMPa
from ..state import Collected, stood_in
from . import checkpoint, saved_weights
from .replaced import replacing


logger = get_logger(__name__)

# What transformers' save on SIGTERM leaves in the folder that it makes beforehand.
ANNOUNCED = "checkpoint-is-incomplete.txt"
BEFORE_SAVING = "before saving"  # a value of `_step_state`: the step is through, its log line or evaluation is not


class Place(NamedTuple):
    """Where the data go on: the next update batch."""

    epoch: int
    start: int  # micro-batches of the epoch that come before it
    fingerprint: int | None = None  # this replica's; None where it has not been read yet


class SavingMixin:
    """The part of `SAMPaMixin` that writes checkpoints."""

    _exchange: Exchange | None
    _stream: UpdateStream | None
    _collected: Collected
    _batch: UpdateBatch | None = None  # B_t from the beginning of step t on
    _place: Place = Place(0, 0)  # where the data go on, while there is no stream
    _running, _in_epoch = False, False
    _left_epoch = False  # a callback ended the epoch before its data were over
    _saves_next = False  # what the loop does next is save, if it does
    _put_off = _stop_put_off = False  # a checkpoint, and the end of the training, that were asked for within a step
    _broken: str | None = None  # where in a step the run was interrupted
    _content: dict[str, Any] | None = None  # what `checkpoint.write` is to write, while a checkpoint is being written
    _counted: tuple[int, float, float] | None = None  # tokens and operations (new, all) before the step that has begun

    # ---- Where the run is ----

    @property
    def _begun(self) -> bool:
        """Whether the step that comes next has its batch already."""
        return self._batch is not None and self._batch.update == self.state.global_step

    def _next_place(self) -> Place:
        if self._stream is None:
            return self._place
        batch = self._batch if self._begun else self._stream.peek()
        if batch is None:
            return Place(*self._stream.position, 0)
        left = self._left_epoch or (self._in_epoch and self.control.should_epoch_stop)
        if left and (batch.start or self._begun):
            # The rest of this epoch, and with it g_t, is not trained on.
            return Place(batch.epoch + 1, 0)
        return Place(batch.epoch, batch.start, batch.fingerprint)

    def _leave_run(self) -> None:
        """Keep what a checkpoint by hand will need, and end the workers that read ahead."""
        if self._begun and self._counted is not None:
            self.state.num_input_tokens_seen, flos, total = self._counted
            self.current_flos = flos if self.state.total_flos == total else self.current_flos
        self._place, state = self._next_place(), self._step_state
        self._broken = state if self._begun and state in ("in passes", "in update") else self._broken
        self._stream = self._batch = None
        self._running = self._put_off = self._stop_put_off = self._saves_next = False

    def _run_epoch(self, *args, **kwargs):
        self._left_epoch, self._in_epoch = False, True
        read = partial(self._read_and_note, self.get_batch_samples)
        on_epoch_end = partial(self._end_epoch, self.callback_handler.on_epoch_end)
        try:
            with (
                stood_in(self, "get_batch_samples", read),
                stood_in(self.callback_handler, "on_epoch_end", on_epoch_end),
            ):
                super()._run_epoch(*args, **kwargs)
        finally:
            self._left_epoch, self._in_epoch = self.control.should_epoch_stop, False

    def _read_and_note(self, read: Callable, *args):
        """Read what a step needs, and take note of what was counted before."""
        self._counted = self.state.num_input_tokens_seen, self.current_flos, self.state.total_flos
        return read(*args)

    def _end_epoch(self, on_epoch_end: Callable, *args):
        """The event at which the epoch's log line, evaluation and save are still to come."""
        self._step_state = BEFORE_SAVING
        return on_epoch_end(*args)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        self._agree_on_ending()
        self.control.should_save = self.control.should_save or self._put_off
        self._step_state, self._saves_next = "between", True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            if self._put_off:  # with save_strategy="best" an evaluation decides anew
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        finally:
            self._saves_next = False

    def log(self, *args, **kwargs):
        with self._before_saving():
            super().log(*args, **kwargs)

    def _evaluate(self, *args, **kwargs):
        with self._before_saving():
            return super()._evaluate(*args, **kwargs)

    @contextmanager
    def _before_saving(self) -> Iterator[None]:
        """Around what the loop does after a step and before it saves."""
        before = self._step_state
        self._step_state = BEFORE_SAVING if self._saves_next else before
        try:
            yield
        finally:
            self._step_state = before

    # ---- Now or later ----

    def _is_put_off(self, trial) -> bool:
        """Whether a checkpoint is to wait until the step is through; takes note of it then."""
        within = self._running and self._step_state != "between"
        # On SIGTERM the processes ask at different moments, each on its own.
        alone = (
            self.args.enable_jit_checkpoint and self.args.world_size > 1 and self._in_epoch and not self._saves_next
        )
        if not (within or alone):
            return False
        logger.warning("A checkpoint was asked for within a step: it is saved at the end of the step, which is exact.")
        self._put_off = self.control.should_save = True
        if alone:
            self._stop_put_off = self._stop_put_off or self.control.should_training_stop
            self.control.should_training_stop = False
        folder = self._checkpoint_folder(trial)
        (folder / ANNOUNCED).unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or something is in it
            folder.rmdir()
        return True

    def _agree_on_ending(self) -> None:
        """On SIGTERM all processes save and stop after the same step. A collective."""
        if not (self.args.enable_jit_checkpoint and self.args.world_size > 1):
            return
        own = torch.tensor([self._put_off, self._stop_put_off], device=self.args.device).long()
        self._put_off, stop = self._exchange.gather(own).any(dim=0).tolist()
        self._stop_put_off = False
        self.control.should_training_stop = self.control.should_training_stop or stop

    def _checkpoint_folder(self, trial) -> Path:
        return Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if self._running and self._step_state == "in passes":
            raise RuntimeError(
                "save_model: expected to be called between two steps, but within a step the model holds displaced weights. Call "
                "it in a callback, or set control.should_save = True, by which the loop saves after the step."
            )
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.save_only_model:
            self._write(output_dir)

    # ---- Writing ----

    def _save_checkpoint(self, model, trial):
        if self._is_put_off(trial):
            return
        self._reach_others()
        folder = self._checkpoint_folder(trial)
        try:
            # All that can be refused is refused before anything is written.
            self._content = self._to_save(folder)
            with self._as_before_the_step(), replacing(folder) if self.args.should_save else nullcontext() as old:
                self._exchange.meet()  # the others write into the folder, once the old one is out of the way
                self._begin_checkpoint(folder, old)
                super()._save_checkpoint(model, trial)
        finally:
            self._content = None
        self._put_off = False

    def _begin_checkpoint(self, folder: Path, old: Path | None) -> None:
        """Called before anything is written into `folder`; `old` is where the one is that it replaces."""

    def _reach_others(self) -> None:
        """Connect the processes anew, where an exception has cut what they were sending."""
        if self.sampa is None:
            raise RuntimeError(
                "Expected a run whose checkpoint could be saved, but nothing was trained yet. Call train() first; save_model() "
                "saves the weights alone."
            )
        if self._exchange is None:
            self._connect()
            self.sampa.connect(self._exchange)
            self._collected.exchange = self._exchange

    def _to_save(self, folder: Path) -> dict[str, Any] | None:
        """What `checkpoint.write` is to write; None on processes that do not write. Raises RuntimeError for what cannot be saved."""
        self._check_savable(folder)
        self.sampa.check_alike()
        place = self._next_place()
        fingerprints = self._fingerprints(place)
        grads, ascent = {}, {}
        if fingerprints is not None and isinstance(self.sampa, SAMPa):  # otherwise there is no batch that g_t is of
            grads, ascent = self.sampa.state_dict()
        collected = self._exchange.share_objects(self._collected.state_dict(saved=True))[: self.args.num_replicas]
        if not self.args.should_save:
            return None
        position = {"epoch": place.epoch, "start": place.start, "fingerprints": fingerprints}
        content = self._settings_to_save() | self._progress_to_save() | {"position": position, "ascent": ascent}
        named = list(zip(self.sampa.names, self.sampa.params, strict=True))
        tensors = {
            "": grads,
            checkpoint.FORWARD_STATE: self.sampa.forward_state.state_dict(),
            checkpoint.OTHERS: {name: param.detach() for name, param in named[self.sampa.of_model :]},
        }
        states = {checkpoint.RECIPE: self.sampa.recipe_state()}
        states[checkpoint.COLLECTED] = {"of_replicas": collected} if any(collected) else {}
        if self.args.save_only_model:
            content |= {"kept": "weights", "ascent": {}}
            tensors[""], states = {}, {}
        return {"tensors": tensors, "content": content, "states": states}

    def _check_savable(self, folder: Path) -> None:
        """Raise RuntimeError where there is no one step whose state could be saved; forget a g_t that was lost. A collective."""
        step = self.state.global_step
        if self.weights_step != step:
            raise RuntimeError(
                f"Expected the weights of step {step}, whose optimizer state there is, but load_best_model_at_end has loaded those "
                f"of step {self.weights_step}. save_model() saves them; to go on, resume from the last checkpoint."
            )
        has_ascent = isinstance(self.sampa, SAMPa) and self.sampa.ascent is not None
        of_all = self._exchange.share_objects((step, self._broken, has_ascent))
        steps, broken, ascents = (set(each) for each in zip(*of_all, strict=True))
        if len(steps) > 1 or "in update" in broken:
            where = (
                "within the optimizer's step"
                if len(steps) == 1
                else f"after different steps, {sorted(steps)}, on its processes"
            )
            raise RuntimeError(
                f"Expected a run that stopped after a step, but it was interrupted {where}, so that weights and optimizer state may "
                "be of two steps. Resume from the last checkpoint."
            )
        if "in passes" in broken or len(ascents) > 1:
            lost = ""
            if isinstance(self.sampa, SAMPa):
                self.sampa.forget()
                lost = " g_t is lost, and is computed anew when the run goes on."
            logger.warning(
                f"The run was interrupted within a step: {folder} has the weights and the optimizer state before it.{lost} What "
                "goes on from there is close to a run that was never stopped, but not equal to it."
            )

    def _fingerprints(self, place: Place) -> list[int] | None:
        """Of the next update batch, by replica, 0 where the data are over; None where it is not known. A collective."""
        own = torch.tensor([-1 if place.fingerprint is None else place.fingerprint], device=self.args.device)
        found = self._exchange.gather(own)[: self.args.num_replicas, 0].tolist()
        return None if -1 in found else found

    def _progress_to_save(self) -> dict[str, Any]:
        unlogged = self._unlogged or {
            "loss": self._tr_loss.item(),
            "since_step": self._globalstep_last_logged,
            "means": self._means.state_dict(),
        }
        return {
            "continued": self.continued,
            "evaluations": plain(bound(self, self._evaluations), self.state.log_history),
            "skipped": {"steps": self.sampa.skipped_steps, "in_a_row": self.sampa.skipped_in_a_row},
            "unlogged": unlogged,
            "moving": sorted(self.sampa.forward_state.moving),
            "weights": saved_weights.record(self.model, self.sampa.names[: self.sampa.of_model]),
        }

    def _settings_to_save(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "recipe": self._recipe_settings(),
            "optimizer": self._optimizer_name(),
            "computation": computation(self),
            "stream": self._stream_settings(),
        }

    def _write(self, output_dir: str) -> None:
        if self._content is not None:
            checkpoint.write(Path(output_dir), **self._content)

    def _save_optimizer_and_scheduler(self, output_dir):
        with self.sampa.placement.whole_optimizer():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        # The last that Trainer writes before trainer_state.json: see `hf_sampa.checkpoints.checkpoint` for why then.
        super()._save_rng_state(output_dir)
        self._write(output_dir)

    # ---- Counts: micro-batches that were counted, but not trained on yet ----

    @contextmanager
    def _as_before_the_step(self) -> Iterator[None]:
        """Within the block the run has counted what steps that are through have read, and nothing else."""
        if not self._begun or self._counted is None:
            yield
            return
        tokens, flos = self.state.num_input_tokens_seen, self.current_flos
        before = self._counted
        self.state.num_input_tokens_seen, self.current_flos, _ = before
        try:
            yield
        finally:
            kept = self.current_flos  # none, where saving has added them to the state's
            self.state.num_input_tokens_seen, self.current_flos = tokens, flos - before[1] + kept
            self._counted = before[0], kept, self.state.total_flos
