"""Saving and continuing runs: Trainer's checkpoints made exact, recognisably whole, and loaded to the last tensor."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerState

from . import checkpoint
from .batches import UpdateStream
from .card_facts import computation
from .evaluations import Evaluation, bound, plain
from .sampa import SAMPa
from .sharding import ShardedSAMPa


logger = get_logger(__name__)

# What a checkpoint without a word on it was written with.
BEFORE_VARIANTS = {"variant": "sam", "variant_args": {}}


class ResumeMixin:
    """The part of `SAMPaMixin` that writes and reads checkpoints."""

    _unlogged: dict[str, Any] | None = None  # sums that the next log line takes up, from the checkpoint
    _expected: list[int] | None = None  # fingerprints of the next update batch, from the checkpoint
    _folder: str | None = None  # where weights are being loaded from

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in Trainer; ``True`` takes the last whole checkpoint and says which torn ones it passed over.

        Raises ValueError for a checkpoint that is torn, foreign, of a newer format or of another data stream or model.
        """
        if resume_from_checkpoint is True:
            folder, problems = checkpoint.last_whole(Path(self.args.output_dir))
            for problem in problems:
                logger.warning(f"Passing over a checkpoint. {problem}")
            resume_from_checkpoint = str(folder)
        elif resume_from_checkpoint:
            checkpoint.inspect(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self._exchange = None  # what it had begun to send would reach the next run
            raise
        finally:
            self._stream = None  # ends the workers that read ahead

    # ---- Writing ----

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            checkpoint.invalidate(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir):
        with self.sampa.whole_optimizer() if isinstance(self.sampa, ShardedSAMPa) else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        # The last that Trainer writes before trainer_state.json: see `hf_sampa.checkpoint` for why then.
        super()._save_rng_state(output_dir)
        self.sampa.check_weights()
        epoch, start = self._stream.position
        position = {"epoch": epoch, "start": start, "fingerprints": self._fingerprints()}
        grads, ascent = self.sampa.state_dict() if isinstance(self.sampa, SAMPa) else ({}, {})
        if self.control.should_epoch_stop and start:
            # As `_run_epoch` will do: the rest of this epoch, and with it g_t, is not trained on.
            position = {"epoch": epoch + 1, "start": 0, "fingerprints": None}
            grads, ascent = {}, {}
        if not self.args.should_save:
            return
        content = {
            "settings": self._settings(),
            "recipe": self._recipe_settings(),
            "optimizer": self._optimizer_name(),
            "computation": computation(self),
            "continued": self.continued,
            "evaluations": plain(bound(self, self._evaluations), self.state.log_history),
            "stream": self._stream_settings(),
            "position": position,
            "ascent": ascent,
            "skipped": {"steps": self.sampa.skipped_steps, "in_a_row": self.sampa.skipped_in_a_row},
            "unlogged": {
                "loss": self._tr_loss.item(),
                "since_step": self._globalstep_last_logged,
                "means": self._means.state_dict(),
            },
        }
        checkpoint.write(Path(output_dir), grads, content, self.sampa.recipe_state())

    def _fingerprints(self) -> list[int]:
        """Of the next update batch, by replica, 0 where the data are over; a collective."""
        ahead = self._stream.peek()
        own = torch.tensor([ahead.fingerprint if ahead else 0], device=self.args.device)
        return self._exchange.gather(own)[: self.args.num_replicas, 0].tolist()

    def _settings(self) -> dict[str, Any]:
        return {"method": self.args.method, "rho": self.args.rho, "lmbda": self.args.lmbda}

    def _recipe_settings(self) -> dict[str, Any]:
        """What the step is made of."""
        if self._recipe is not None:
            return self._recipe.settings
        return {"variant": self.args.variant, "variant_args": self.args.variant_args}

    def _optimizer_name(self) -> str:
        return type(self.optimizer.optimizer).__name__

    def _stream_settings(self) -> dict[str, Any]:
        """What decides which samples are in B_t."""
        args = self.args
        return {
            "per_device_train_batch_size": self._train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "replicas": args.num_replicas,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "train_sampling_strategy": args.train_sampling_strategy,
            "dataloader_drop_last": args.dataloader_drop_last,
        }

    # ---- Reading ----

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        found = checkpoint.inspect(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        if found is None or self.args.ignore_data_skip:
            return place
        # Upstream counts epochs by their nominal number of steps, which iterable datasets do not have.
        return found["position"]["epoch"], found["position"]["start"]

    def _resume(self, folder: str | None) -> None:
        """Take up the engine's state from the checkpoint in `folder`, if any."""
        self._unlogged = self._expected = None
        if folder is None:
            return
        found = checkpoint.inspect(Path(folder))
        self._check_optimizer(folder, found or {})
        if found is None:
            logger.warning(
                f"{folder} holds no state of SAMPa, as plain Trainer leaves it: g_t is computed at its weights."
            )
            self.continued = [f"steps 1 to {self._steps_of(folder)} were plain Trainer's"]
            return
        if differing := checkpoint.changed(found["stream"], self._stream_settings()):
            raise ValueError(
                f"Expected the data stream that {folder} was written with, but it changed: {'; '.join(differing)}. "
                "Resume with the old values, or start a new run from these weights."
            )
        if differing := checkpoint.changed(found.get("recipe", BEFORE_VARIANTS), self._recipe_settings()):
            raise ValueError(
                f"Expected the variant that {folder} was written with, but it changed: {'; '.join(differing)}. Resume with "
                "the old one, or start a new run from these weights."
            )
        for difference in checkpoint.changed(found["settings"], self._settings()):
            logger.warning(f"Resuming with a changed setting, {difference}.")
        self.continued = [*found.get("continued", []), *self._other_settings(folder, found)]
        self._evaluations = [Evaluation(**each) for each in found.get("evaluations", [])]
        self.sampa.skipped_steps, self.sampa.skipped_in_a_row = found["skipped"]["steps"], found["skipped"]["in_a_row"]
        self._unlogged = found["unlogged"]
        self._expected = None if self.args.ignore_data_skip else found["position"]["fingerprints"]
        self.sampa.load_recipe_state(checkpoint.read_recipe(Path(folder)))
        if self.args.ignore_data_skip:
            logger.warning("ignore_data_skip: the stream starts its epoch anew, and g_t is computed there.")
            return
        if isinstance(self.sampa, SAMPa):
            self.sampa.load_state_dict(checkpoint.read_tensors(Path(folder)), found["ascent"])

    def _other_settings(self, folder: str, found: dict[str, Any]) -> list[str]:
        """A sentence on what is computed otherwise from here on; nothing where all is as it was."""
        now = computation(self)
        was = found.get("computation", now)  # not in checkpoints of earlier versions
        names = [name for name in {**now, **was} if was.get(name) != now.get(name)]
        differing = [f"{name} {was.get(name, 'none')}, then {now.get(name, 'none')}" for name in names]
        after = f"continued after step {self._steps_of(folder)} with other settings"
        return [f"{after}: {'; '.join(differing)}"] if differing else []

    def _steps_of(self, folder: str) -> int:
        return TrainerState.load_from_json(str(Path(folder) / checkpoint.TRAINER_STATE)).global_step

    def _check_optimizer(self, folder: str, found: dict[str, Any]) -> None:
        """Raise ValueError where the loaded state is another optimizer's; by its options, where the checkpoint does not say."""
        optimizer, own = self.optimizer.optimizer, self._optimizer_name()
        wrote = found.get("optimizer", own)
        # torch adds `differentiable` to the defaults afterwards.
        missing = optimizer.defaults.keys() - optimizer.param_groups[0].keys() - {"differentiable"}
        if wrote != own or missing:
            raise ValueError(
                f"Expected the state of {own} in {folder}, but it is that of {wrote if wrote != own else 'another optimizer'}. "
                "Resume with the old optim, or start a new run from these weights."
            )

    def _open_stream(self, epoch: int, start: int) -> None:
        """Begin the stream at micro-batch `start` of `epoch`."""
        with self._exchange.role_world.lent():
            self._stream = UpdateStream(
                self._loader,
                seed=self._data_seed,
                accumulation=self.args.gradient_accumulation_steps,
                epoch=epoch,
                start=start,
                update=self.state.global_step,
                read=self._read_batch,
            )
        self._check_same_data()
        if self._unlogged:
            # `_total_loss_scalar` counts this call's steps only, so what came before is taken out again.
            self._tr_loss += self._unlogged["loss"]
            self._total_loss_scalar -= self._unlogged["loss"]
            self._globalstep_last_logged = self._unlogged["since_step"]
            self._means.load_state_dict(self._unlogged["means"])

    def _check_same_data(self) -> None:
        if self._expected is not None and (found := self._fingerprints()) != self._expected:
            raise ValueError(
                "Expected the next update batch to be the one that the checkpoint's run would have read, with "
                f"fingerprints {self._expected}, but got {found}: the training data, its order or its processing "
                "changed, or draws from generators of its own. Resume with the old data, or set ignore_data_skip=True to "
                "start the epoch anew."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        self._folder = resume_from_checkpoint
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"The weights in {resume_from_checkpoint} are of another model: {error}") from error

    def _load_best_model(self):
        self._folder = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        super()._issue_warnings_after_load(load_result)
        if load_result.missing_keys or load_result.unexpected_keys:
            checkpoint.load_every_tensor(self.model, self._folder)
