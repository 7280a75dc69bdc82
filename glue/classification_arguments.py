"""Command line of run_classification.py: the data's arguments, the training arguments, the paper's settings as defaults."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from typing import ClassVar

from own_metric import LESS_IS_BETTER, metric_names
from own_problem import MULTI, REGRESSION, SINGLE
from tasks import PAPER_SETTINGS
from text_arguments import TextArguments, TextModelArguments

from hf_sampa.finetuning import FineTuningArguments, FineTuningParser, parse_arguments


USAGE = r"""python -m hf_sampa launch glue/run_classification.py --train_file FILE --validation_file FILE --output_dir FOLDER [options]
   or: python glue/run_classification.py --train_file FILE --train_val_split 0.1 --output_dir FOLDER [options]"""
DESCRIPTION = """Fine-tune an encoder on texts of your own with SAMPa (or --method sam, adamw), save it, score it, and predict. The
first command starts a SAMPa pair of two processes, the second one process, with the same numbers in
about twice the time (bit for bit with OMP_NUM_THREADS=1, which the first command sets). More commands are at the top of glue/run_classification.py."""


@dataclass(kw_only=True)
class ClassificationArguments(TextArguments):
    """Where the texts and labels are, and what they are.

    Raises:
        ValueError: there are no data, or two places for them.
    """

    _argument_group_name: ClassVar[str] = "data"

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Texts and labels to train on: .csv, .tsv, .jsonl (an object in every line) or .json (an array of them)."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to score on."})
    test_file: str | None = field(
        default=None, metadata={"help": "The same, for --do_predict; it is scored, too, if it has labels."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub or in a folder, in the place of files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of its repository."})
    train_split_name: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "Its split to score on."})
    test_split_name: str = field(default="test", metadata={"help": "Its split to predict."})
    text_column_names: str | None = field(
        default=None,
        metadata={
            "help": "Column of the text, or two with a comma between them. Default: text, sentence, premise and hypothesis, or another usual name."
        },
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the label, or with commas between them several columns of 0 and 1, each named as a label that a text has or "
            "has not. Default: label or another usual name."
        },
    )
    label_delimiter: str | None = field(
        default=None, metadata={"help": "What stands between several labels of one text in a field."}
    )
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "What is predicted. Default: several labels where there are lists, classes where there are words or a few whole numbers, "
            "a score where there are numbers with a fraction.",
            "choices": [SINGLE, MULTI, REGRESSION],
        },
    )
    metric_name: str | None = field(
        default=None,
        metadata={
            "help": "What to score with, one or more with a comma between them, or what evaluate.load finds. Default: the first two of "
            f"{metric_names()}."
        },
    )
    delimiter: str | None = field(
        default=None,
        metadata={"help": "Between the fields of a table, if it is not the comma of .csv or the tab of .tsv."},
    )
    quotes: bool = field(
        default=True,
        metadata={
            "help": "Whether fields of a table may be in double quotes; otherwise a double quote is a character like any other."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        files = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name) is not None]
        if bool(files) == (self.dataset_name is not None):
            got = f"--dataset_name and --{files[0]}" if files else "neither"
            raise ValueError(
                f"Expected --train_file (or --validation_file, --test_file), or --dataset_name, got {got}. Say where the texts are."
            )
        if self.train_val_split is not None and self.validation_file is not None:
            raise ValueError(
                "--train_val_split: there is a --validation_file to score on already. Leave one of the two out."
            )


def make_parser() -> FineTuningParser:
    """Parser with the paper's settings for GLUE as defaults."""
    parser = FineTuningParser(
        (TextModelArguments, ClassificationArguments, FineTuningArguments),
        usage=USAGE,
        description=DESCRIPTION,
        epilog="The defaults are the paper's for GLUE.",
    )
    parser.set_defaults(**PAPER_SETTINGS)
    return parser


def parse_args(
    argv: list[str] | None = None,
) -> tuple[TextModelArguments, ClassificationArguments, FineTuningArguments]:
    """Read the command line. Of errors, as mse, the smallest is the best by default.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
        ValueError: an argument is not in its range, or contradicts another.
    """
    return parse_arguments(make_parser(), argv, _defaults)


def _defaults(given: Namespace) -> dict[str, bool]:
    best = given.metric_for_best_model
    return {"greater_is_better": False} if best and best.removeprefix("eval_") in LESS_IS_BETTER else {}
