"""Continuing runs: Trainer's checkpoints taken up exactly, recognisably whole, and loaded to the last tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel, TrainerState

from ..cards import Evaluation, computation
from ..data import UpdateStream
from ..engine import SAMPa
from ..state import make_room
from . import checkpoint
from .replaced import restore, restore_all
from .saved_weights import holds, left_out, load_every_tensor
from .saving import Place, SavingMixin


logger = get_logger(__name__)

# What a checkpoint without a word on it was written with.
BEFORE_VARIANTS = {"variant": "sam", "variant_args": {}}


class ResumeMixin(SavingMixin):
    """The part of `SAMPaMixin` that reads checkpoints."""

    _unlogged: dict[str, Any] | None = None  # sums that the next log line takes up, from the checkpoint
    _expected: list[int] | None = None  # fingerprints of the next update batch, from the checkpoint
    _folder: str | None = None  # where weights are being loaded from
    _start: tuple[int, int] = (0, 0)  # epoch, and micro-batches of it, where the run in progress begins

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in Trainer; ``True`` takes the last whole checkpoint and says which torn ones it passed over.

        Raises ValueError for a checkpoint that is torn, foreign, of a newer format or of another data stream or model.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self._running = True
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self._exchange = None  # what it had begun to send would reach the next run
            raise
        finally:
            self._leave_run()

    def _find_checkpoint(self, given: str | bool) -> str:
        """A whole checkpoint, after putting back what a process that was killed had moved aside. A collective."""
        output_dir = Path(self.args.output_dir)
        self._connect()
        if self.args.should_save:
            restore_all(output_dir) if given is True else restore(Path(given))
        self._exchange.meet()
        if given is not True:
            checkpoint.inspect(Path(given))
            return given
        folder, problems = checkpoint.last_whole(output_dir)
        for problem in problems:
            logger.warning(f"Passing over a checkpoint. {problem}")
        return str(folder)

    # ---- What is compared with the checkpoint's run ----

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

    # ---- Taking up ----

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        found = checkpoint.inspect(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        if found is not None and not self.args.ignore_data_skip:
            # Upstream counts epochs by their nominal number of steps, which iterable datasets do not have.
            place = found["position"]["epoch"], found["position"]["start"]
        self._start = place
        return place

    def _resume(self, folder: str | None) -> None:
        """Begin a run, and take up the engine's state from the checkpoint in `folder`, if any."""
        self._unlogged = self._expected = self._batch = self._broken = None
        self._left_epoch, self._place = False, Place(*self._start)
        if folder is None:
            return
        found = checkpoint.inspect(Path(folder))
        if found is None:
            self._check_optimizer(folder, {})
            logger.warning(
                f"{folder} holds no state of SAMPa, as plain Trainer leaves it: g_t is computed at its weights."
            )
            self.continued = [f"steps 1 to {self._steps_of(folder)} were plain Trainer's"]
            return
        only_weights = found.get("kept") == "weights"
        if not only_weights:
            self._check_optimizer(folder, found)
            self._check_variant(folder, found)
        self._check_stream(folder, found)
        for difference in checkpoint.changed(found["settings"], self._settings()):
            logger.warning(f"Resuming with a changed setting, {difference}.")
        self.continued = [*found.get("continued", []), *self._other_settings(folder, found)]
        self._evaluations = [Evaluation(**each) for each in found.get("evaluations", [])]
        self.sampa.skipped_steps, self.sampa.skipped_in_a_row = found["skipped"]["steps"], found["skipped"]["in_a_row"]
        self._unlogged = found["unlogged"]
        self._load_beside(folder, found)
        if not self.args.ignore_data_skip:
            self._expected = found["position"]["fingerprints"]
            own = self._expected and self._expected[self.args.mesh.replica]
            self._place = Place(*self._start, own)
        if only_weights:
            self._begin_anew(folder)
        else:
            self._take_up(folder, found)

    def _take_up(self, folder: str, found: dict[str, Any]) -> None:
        """What the step and the trainer's own code remember, and g_t."""
        self.sampa.load_recipe_state(checkpoint.read_state(Path(folder), checkpoint.RECIPE))
        of_replicas = checkpoint.read_state(Path(folder), checkpoint.COLLECTED).get("of_replicas")
        if of_replicas:
            self._collected.load_state_dict(of_replicas[min(self.args.mesh.replica, len(of_replicas) - 1)])
        if self.args.ignore_data_skip:
            logger.warning("ignore_data_skip: the stream starts its epoch anew, and g_t is computed there.")
        elif isinstance(self.sampa, SAMPa):
            self.sampa.load_state_dict(checkpoint.read_tensors(Path(folder)), found["ascent"])

    def _begin_anew(self, folder: str) -> None:
        """All but the weights, where nothing but the weights was kept."""
        logger.warning(
            f"{folder} holds the weights alone, as save_only_model=True leaves it: the optimizer, its schedule and g_t start anew."
        )
        self.continued += [
            f"steps 1 to {self._steps_of(folder)} were SAMPa's, of which only the weights were kept: optimizer, schedule and "
            "g_t began anew after them"
        ]

    def _load_beside(self, folder: str, found: dict[str, Any]) -> None:
        """What moves and what is trained besides the model's weights."""
        state, names = self.sampa.forward_state, self.sampa.names[self.sampa.of_model :]
        if "moving" not in found:  # written before it was known what forward moves
            state.moving |= {name for name, _ in self.model.named_buffers() if name in self.model.state_dict()}
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
        own = dict(zip(names, self.sampa.params[self.sampa.of_model :], strict=True))
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
                param.copy_(saved[name])

    def _check_stream(self, folder: str, found: dict[str, Any]) -> None:
        differing = checkpoint.changed(found["stream"], self._stream_settings())
        if differing and not self.args.ignore_data_skip:
            raise ValueError(
                f"Expected the data stream that {folder} was written with, but it changed: {'; '.join(differing)}. "
                "Resume with the old values, set ignore_data_skip=True to start the epoch anew with a new g_t, or start a new run "
                "from these weights."
            )
        for difference in differing:
            logger.warning(f"Resuming with another data stream, {difference}.")

    def _check_variant(self, folder: str, found: dict[str, Any]) -> None:
        if differing := checkpoint.changed(found.get("recipe", BEFORE_VARIANTS), self._recipe_settings()):
            raise ValueError(
                f"Expected the variant that {folder} was written with, but it changed: {'; '.join(differing)}. Resume with "
                "the old one, or start a new run from these weights."
            )

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
        self._batch = None
        self._check_same_data()
        if self._unlogged:
            # `_total_loss_scalar` counts this call's steps only, so what came before is taken out again.
            self._tr_loss += self._unlogged["loss"]
            self._total_loss_scalar -= self._unlogged["loss"]
            self._globalstep_last_logged = self._unlogged["since_step"]
            self._means.load_state_dict(self._unlogged["means"])
        self._unlogged = None

    def _check_same_data(self) -> None:
        if self._expected is not None and (found := self._fingerprints(self._next_place())) != self._expected:
            raise ValueError(
                "Expected the next update batch to be the one that the checkpoint's run would have read, with "
                f"fingerprints {self._expected}, but got {found}: the training data, its order or its processing "
                "changed, or draws from generators of its own. Resume with the old data, or set ignore_data_skip=True to "
                "start the epoch anew."
            )

    # ---- Weights ----

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        self._folder = resume_from_checkpoint
        make_room(self.model, checkpoint.read_tensors(Path(resume_from_checkpoint), checkpoint.FORWARD_STATE))
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"The weights in {resume_from_checkpoint} are of another model: {error}") from error
        if isinstance(self.model, PreTrainedModel) and self._lacks_weights_of(resume_from_checkpoint):
            load_every_tensor(self.model, resume_from_checkpoint)
        if self._lacks_weights_of(resume_from_checkpoint):
            raise ValueError(
                f"Expected the model to hold the weights that were saved in {resume_from_checkpoint}, but after loading it holds "
                "others: the files were changed, or have not every tensor that is trained, as weights beside peft's adapters that "
                "are not in modules_to_save. Resume from another checkpoint, or load these weights into the model of a new run."
            )

    def _lacks_weights_of(self, folder: str) -> bool:
        recorded = checkpoint.recorded_weights(Path(folder))
        return recorded is not None and not holds(self.model, recorded)

    def _load_best_model(self):
        best = self._folder = self.state.best_model_checkpoint
        make_room(self.model, checkpoint.read_tensors(Path(best), checkpoint.FORWARD_STATE))
        super()._load_best_model()
        if not Path(best).is_dir():
            return  # upstream says so
        if self._lacks_weights_of(best):
            self._load_from_checkpoint(best)  # some trainers log what fails there, and go on
        found = checkpoint.inspect(Path(best))
        if found is not None and "moving" in found:
            self._load_beside(best, found)

    def _issue_warnings_after_load(self, load_result):
        if isinstance(self.model, PreTrainedModel):
            super()._issue_warnings_after_load(load_result)
        if set(load_result.missing_keys) - left_out(self.model) or load_result.unexpected_keys:
            load_every_tensor(self.model, self._folder)
