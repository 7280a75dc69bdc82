"""Command line of run_glue.py: the task's arguments, the training arguments, the paper's settings as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tasks import HUB_DATASET, PAPER_SETTINGS, TASKS, TaskName
from text_arguments import TextArguments, TextModelArguments

from hf_sampa.finetuning import FineTuningArguments, FineTuningParser, parse_arguments


USAGE = r"""python -m hf_sampa launch glue/run_glue.py --task_name TASK --output_dir FOLDER [options]
   or: python glue/run_glue.py --task_name TASK --output_dir FOLDER [options]"""
DESCRIPTION = """Fine-tune an encoder on a GLUE task with SAMPa (or --method sam, adamw), save it, and score it on the
task's dev sets. The first command starts a SAMPa pair of two processes, the second
one process, with the same numbers in about twice the time (bit for bit with
OMP_NUM_THREADS=1, which the first command sets). More commands are at the top of glue/run_glue.py."""


@dataclass(kw_only=True)
class GlueArguments(TextArguments):
    """Which task, and where its data are.

    Raises:
        ValueError: there is no such task.
    """

    _argument_group_name: ClassVar[str] = "task and data"

    task_name: TaskName = field(
        metadata={"help": "The GLUE task, in any spelling (sst2, SST-2).", "choices": list(TASKS)}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with the official files of this task: train.tsv for --do_train, dev.tsv (MNLI: dev_matched.tsv "
            "and dev_mismatched.tsv) for --do_eval, test.tsv for --do_predict (MNLI: two of them, and diagnostic.tsv if it is "
            f"there). Without it the task is loaded from {HUB_DATASET} on the Hub."
        },
    )


def make_parser() -> FineTuningParser:
    """Parser with the paper's settings for GLUE as defaults; `parse_args` puts in those of the task."""
    exceptions = [
        f"{name}: {', '.join(f'{setting} {value}' for setting, value in task.settings.items())}"
        for name, task in TASKS.items()
        if task.settings
    ]
    parser = FineTuningParser(
        (TextModelArguments, GlueArguments, FineTuningArguments),
        usage=USAGE,
        description=DESCRIPTION,
        epilog=f"The defaults are the paper's for GLUE, and by task {'; '.join(exceptions)}.",
    )
    parser.set_defaults(**PAPER_SETTINGS)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[TextModelArguments, GlueArguments, FineTuningArguments]:
    """Read the command line. The paper's settings for the task are the defaults; what is given explicitly wins.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
        ValueError: an argument is not in its range.
    """
    return parse_arguments(
        make_parser(), argv, lambda given: TASKS[given.task_name].paper_settings if given.task_name else {}
    )
