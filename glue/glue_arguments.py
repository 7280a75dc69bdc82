"""Command line of run_glue.py: the task's arguments, the training arguments, the paper's settings as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tasks import HUB_DATASET, PAPER_SETTINGS, TASKS
from transformers import HfArgumentParser

from hf_sampa import SAMPaTrainingArguments


@dataclass
class GlueArguments:
    """What to train on which task."""

    _argument_group_name: ClassVar[str] = "task, data and model"

    task_name: str = field(metadata={"help": "The GLUE task.", "choices": list(TASKS)})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with the official train.tsv and dev.tsv of this task (MNLI: dev_matched.tsv and "
            f"dev_mismatched.tsv). Without it the task is loaded from {HUB_DATASET} on the Hub."
        },
    )
    model_name_or_path: str = field(
        default="bert-base-uncased",
        metadata={"help": "Encoder on the Hub or in a folder. A folder without weights is trained from scratch."},
    )
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer ones are truncated."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each dev set."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into an output_dir that is not empty."})


@dataclass
class GlueTrainingArguments(SAMPaTrainingArguments):
    """SAMPa's training arguments with the AdamW baseline as a third method, and the batch size given per update.

    Raises:
        ValueError: `batch_size` cannot be split over the processes and micro-batches.
    """

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
        default=PAPER_SETTINGS["batch_size"],
        metadata={"help": "Examples per update, over all processes and micro-batches."},
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Follows from batch_size: leave it out."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples per device for evaluation."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to score the dev sets at the end."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to score the dev sets: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep; older ones are deleted. One of BERT-base takes 1.3 GB."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many updates (below 1: share of all)."})
    report_to: str | None = field(default="none", metadata={"help": "Where to report to, as in TrainingArguments."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint folder to continue from, or true: the last whole one in output_dir."},
    )

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint in ("true", "True"):
            self.resume_from_checkpoint = True  # Trainer takes a bool or a path; the command line has only strings
        given = self.per_device_train_batch_size
        # The base class wants a number, and knows the processes only when it is done.
        self.per_device_train_batch_size = given or self.batch_size
        super().__post_init__()
        devices = self.num_replicas * max(1, self.n_gpu)
        shares = devices * self.gradient_accumulation_steps
        if self.batch_size < 1 or self.batch_size % shares:
            raise ValueError(
                f"--batch_size must be a positive multiple of {shares} ({devices} device(s) share an update batch, in "
                f"{self.gradient_accumulation_steps} micro-batch(es) each), got {self.batch_size}. Change it, the "
                "number of processes or --gradient_accumulation_steps."
            )
        self.per_device_train_batch_size = self.batch_size // shares
        if given not in (None, self.per_device_train_batch_size):
            raise ValueError(
                f"--batch_size {self.batch_size} makes --per_device_train_batch_size {self.per_device_train_batch_size} "
                f"here, got {given}. Leave it out, and set --batch_size and --gradient_accumulation_steps."
            )


def make_parser() -> HfArgumentParser:
    """Parser with the paper's settings for GLUE as defaults; `parse_args` puts in those of the task."""
    exceptions = [
        f"{name}: {', '.join(f'{setting} {value}' for setting, value in task.settings.items())}"
        for name, task in TASKS.items()
        if task.settings
    ]
    parser = HfArgumentParser(
        (GlueArguments, GlueTrainingArguments),
        description="Fine-tune an encoder on a GLUE task with SAMPa, SAM or AdamW.",
        epilog=f"The defaults are the paper's for GLUE, and by task {'; '.join(exceptions)}.",
    )
    parser.set_defaults(**PAPER_SETTINGS)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[GlueArguments, GlueTrainingArguments]:
    """Read the command line. The paper's settings for the task are the defaults; what is given explicitly wins.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
    """
    parser = make_parser()
    task_name = parser.parse_known_args(argv)[0].task_name
    parser.set_defaults(**TASKS[task_name].paper_settings)
    glue_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    may_write = glue_args.overwrite_output_dir or training_args.resume_from_checkpoint or not training_args.do_train
    output_dir = Path(training_args.output_dir)
    if not may_write and output_dir.is_dir() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"--output_dir {output_dir} is not empty. Choose another folder, add --overwrite_output_dir, or continue "
            "the run in it with --resume_from_checkpoint true."
        )
    return glue_args, training_args
