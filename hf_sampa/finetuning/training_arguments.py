"""`SAMPaTrainingArguments` as the scripts have them: the baseline as a third method, and the batch size of an update."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..training_args import SAMPaTrainingArguments
from .output_folder import RUN


@dataclass
class FineTuningArguments(SAMPaTrainingArguments):
    """`SAMPaTrainingArguments` with the baseline as a third method, and the batch size given per update.

    So one command line makes updates of the same size with every method and number of processes. `do_train` and `do_eval`
    are on, and every epoch is scored and saved. What is off is not done, and needs no data.

    Args:
        method (`str`, defaults to `"sampa"`):
            As before, or `"adamw"`: the script is to take the plain `Trainer`.
        batch_size (`int`, defaults to 32):
            Examples per update. `per_device_train_batch_size` follows from it.
        overwrite_output_dir (`bool`, defaults to `False`):
            Whether to train into an `output_dir` that is not empty; see `check_output_dir`.
        early_stopping_patience (`int`, *optional*):
            Stop when so many evaluations in a row are no better than the best one. `load_best_model_at_end` is on then, and a
            resumed run goes on counting.
        early_stopping_threshold (`float`, defaults to 0.0):
            By how much an evaluation must be better, in the units of the metric.
        ema_decay (`float`, *optional*):
            D of an exponential moving average of the weights, above 0 and below 1, by which the run is evaluated, and which is its
            result; see `hf_sampa.finetuning.weight_average`. By default there is none.

    Raises:
        ValueError: the processes and micro-batches cannot share `batch_size` evenly; nothing is to be done; a run is to be
            continued and replaced, or continued and not trained; or a setting is about evaluations during training, and there are
            none.
    """

    _argument_group_name: ClassVar[str] = "training, as in transformers.TrainingArguments"
    METHODS: ClassVar[tuple[str, ...]] = ("adamw", "sam", "sampa")

    method: str = field(
        default="sampa",
        metadata={
            "help": "adamw: the plain Trainer. sam: two gradients per step, one after the other. sampa: two gradients "
            "per step, at the same time on two processes (or in turn on one).",
            "choices": METHODS,
        },
    )
    batch_size: int = field(
        default=32,
        metadata={
            "help": "Examples per update, over all processes and micro-batches; the two processes of a SAMPa pair count "
            "once."
        },
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Follows from batch_size: leave it out."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples per device for evaluation."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(
        default=True, metadata={"help": "Whether to score the evaluation data, during training and at the end."}
    )
    eval_strategy: IntervalStrategy | str = field(
        default="epoch",
        metadata={
            "help": "When to score the evaluation data during training: no, steps or epoch. Without do_eval: no."
        },
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch or best."}
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={
            "help": "Checkpoints to keep; older ones are deleted. With AdamW's state one takes 12 bytes per weight "
            "(BERT-base: 1.3 GB), SAMPa's 16."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many updates (below 1: share of all)."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint folder to continue from, or true: the last whole one in output_dir."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Write into an output_dir that is not empty; what the run before wrote there is moved to a folder inside."
        },
    )
    do_predict: bool = field(default=False, metadata={"help": "Whether to write predictions for the test data."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when so many evaluations in a row are no better than the best one, by metric_for_best_model, whose "
            "weights are then the result. Left out: never."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={
            "help": "With early_stopping_patience: by how much an evaluation must be better, in the units of the metric."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Average the trained weights after every update, a = D a + (1 - D) x with this D, above 0 and below 1 (0.999, say). "
            "Evaluations, the best model, what is saved at the end and predictions are of the average; training goes on from x. It "
            "starts as the weights after the first update, without bias correction. Buffers, as batch norm's statistics, are those of "
            "x. Left out: no average."
        },
    )

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint in ("true", "True"):
            self.resume_from_checkpoint = True  # Trainer takes a bool or a path; the command line has only strings
        self._check_continued()
        self._decide_what_is_done()
        given = self.per_device_train_batch_size
        # The base class wants a number, and knows the processes only when it is done.
        self.per_device_train_batch_size = given or self.batch_size
        super().__post_init__()
        self._check_average()
        devices = self.num_replicas * max(1, self.n_gpu)
        shares = devices * self.gradient_accumulation_steps
        if self.batch_size < 1 or self.batch_size % shares:
            steps = self.gradient_accumulation_steps
            factors = {
                f"{devices} devices, a pair counting once": devices,
                f"--gradient_accumulation_steps {steps}": steps,
            }
            named = ", times ".join(name for name, factor in factors.items() if factor > 1)
            expected = f"multiple of {shares} ({named})" if named else "number"
            raise ValueError(
                f"--batch_size: expected a positive {expected}, got {self.batch_size}. Change it{', or what it is shared by' * bool(named)}."
            )
        self.per_device_train_batch_size = self.batch_size // shares
        if given not in (None, self.per_device_train_batch_size):
            raise ValueError(
                f"--batch_size {self.batch_size} makes --per_device_train_batch_size {self.per_device_train_batch_size} "
                f"here, got {given}. Leave it out, and set --batch_size and --gradient_accumulation_steps."
            )

    def _check_continued(self) -> None:
        given = self.resume_from_checkpoint
        if given is True and self.overwrite_output_dir:
            raise ValueError(
                "--resume_from_checkpoint true goes on with the run in --output_dir and --overwrite_output_dir replaces it: expected one "
                "of the two, got both. Leave one out."
            )
        if given and not self.do_train:
            raise ValueError(
                f"--resume_from_checkpoint {'true' if given is True else given}: expected a run that trains, got --do_train false. Leave "
                "it out: the weights to score or predict with are those of --model_name_or_path, which may be a checkpoint."
            )

    def _decide_what_is_done(self) -> None:
        """`do_eval` off means that nothing is scored: upstream turns it on again for an `eval_strategy`."""
        if not (self.do_train or self.do_eval or self.do_predict):
            raise ValueError(
                "--do_train, --do_eval, --do_predict: expected at least one to be true, got none. Turn one on."
            )
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if patience is not None and (patience < 1 or not threshold >= 0):
            raise ValueError(
                "--early_stopping_patience: expected at least 1 evaluation, and a threshold of at least 0, got "
                f"{patience} and {threshold}. Leave it out for no early stopping."
            )
        if not (self.do_train and self.do_eval):
            wanted = {
                "early_stopping_patience": patience is not None,
                "load_best_model_at_end": self.load_best_model_at_end,
                "eval_on_start": self.eval_on_start,
                "save_strategy": self.save_strategy == SaveStrategy.BEST,
                "eval_strategy": self.eval_strategy not in (IntervalStrategy.NO, type(self).eval_strategy),
            }
            if self.do_train and any(wanted.values()):
                given = ", ".join(f"--{name} {getattr(self, name)}" for name, is_given in wanted.items() if is_given)
                raise ValueError(
                    f"{given}: expected --do_eval true, since it is about evaluations during training, got --do_eval false. "
                    "Leave out one of them."
                )
            self.eval_strategy = IntervalStrategy.NO
            # Of a run that trains nothing, these say nothing.
            self.load_best_model_at_end = False
        elif patience is not None:
            if self.eval_strategy == IntervalStrategy.NO:
                raise ValueError(
                    "--early_stopping_patience: expected evaluations during training, got --eval_strategy no. Set --eval_strategy "
                    "and --save_strategy to epoch, or both to steps."
                )
            # Without the second one, a resumed run would begin to count anew.
            self.load_best_model_at_end = self.restore_callback_states_from_checkpoint = True

    def _check_average(self) -> None:
        if self.ema_decay is None:
            return
        if not 0 < self.ema_decay < 1:
            raise ValueError(
                f"--ema_decay: expected a number above 0 and below 1, got {self.ema_decay:g}. 0.999 is usual; leave it out for no average."
            )
        if "schedule_free" in self.optim:
            raise ValueError(
                f"--ema_decay: expected an optimizer that keeps no average of its own, got --optim {self.optim.value}. Leave one of "
                "them out."
            )
        if not self.do_train:
            self.ema_decay = None  # of a run that trains nothing

    def check_output_dir(self) -> None:
        """Raise FileExistsError for training into an `output_dir` that is not empty, if nothing says that this is meant.

        NotADirectoryError where a file is in its place, or in that of a folder above it.
        """
        folder = Path(self.output_dir)
        # A link to nothing is in the way, too.
        found = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        if not found.is_dir():
            raise NotADirectoryError(
                f"--output_dir {folder}: expected a folder, or a name for one, got {found}, which is no folder. Choose another one."
            )
        meant = self.overwrite_output_dir or self.resume_from_checkpoint or not self.do_train
        # A run that was stopped before it wrote anything leaves the note of what it is, and no more.
        if not meant and folder.is_dir() and any(each.name != RUN for each in folder.iterdir()):
            raise FileExistsError(
                f"--output_dir {folder} is not empty. Choose another folder, add --overwrite_output_dir, or continue "
                "the run in it with --resume_from_checkpoint true."
            )
