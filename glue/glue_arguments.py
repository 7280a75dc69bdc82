"""Command line of run_glue.py: the task's arguments, the training arguments, the paper's settings as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tasks import HUB_DATASET, PAPER_SETTINGS, TASKS
from transformers import HfArgumentParser

from hf_sampa.finetuning import FineTuningArguments, parse_arguments


USAGE = r"""accelerate launch --config_file accelerate_configs/gpu_2.yaml \
           glue/run_glue.py --task_name TASK --output_dir FOLDER [options]
   or: python glue/run_glue.py --task_name TASK --output_dir FOLDER [options]"""
DESCRIPTION = """Fine-tune an encoder on a GLUE task with SAMPa (or --method sam, adamw), save it, and score it on the
task's dev sets. The first command starts a SAMPa pair of two processes (without GPUs: cpu_2_processes.yaml), the second
one process, with the same numbers in about twice the time. More commands are at the top of glue/run_glue.py."""


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


def make_parser() -> HfArgumentParser:
    """Parser with the paper's settings for GLUE as defaults; `parse_args` puts in those of the task."""
    exceptions = [
        f"{name}: {', '.join(f'{setting} {value}' for setting, value in task.settings.items())}"
        for name, task in TASKS.items()
        if task.settings
    ]
    parser = HfArgumentParser(
        (GlueArguments, FineTuningArguments),
        usage=USAGE,
        description=DESCRIPTION,
        epilog=f"The defaults are the paper's for GLUE, and by task {'; '.join(exceptions)}.",
    )
    parser.set_defaults(**PAPER_SETTINGS)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[GlueArguments, FineTuningArguments]:
    """Read the command line. The paper's settings for the task are the defaults; what is given explicitly wins.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
    """
    parser = make_parser()
    task_name = parser.parse_known_args(argv)[0].task_name
    parser.set_defaults(**TASKS[task_name].paper_settings)
    return parse_arguments(parser, argv)
