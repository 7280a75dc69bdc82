r"""Fine-tune an encoder on one of the nine GLUE tasks with SAMPa, SAM or AdamW, with the SAMPa paper's settings.

Two processes, one SAMPa pair:

    python -m hf_sampa launch glue/run_glue.py \
        --task_name rte --method sampa --output_dir out/rte-sampa

One process, the same numbers in about twice the time:

    python -m hf_sampa launch --config one_process glue/run_glue.py \
        --task_name rte --method sampa --output_dir out/rte-sampa-one

The baselines are `--method sam` and `--method adamw`, data parallel over the processes.

Without the Hub, from a folder of official GLUE files and a model folder (here the sample that ships with the project, and
a folder without weights, which is trained from scratch):

    python glue/make_sample.py --tiny_bert out/tiny-bert
    python glue/run_glue.py --task_name sst2 --data_dir glue/sample --model_name_or_path out/tiny-bert \
        --learning_rate 1e-3 --num_train_epochs 8 --output_dir out/sample-sampa

A run that was stopped goes on from its last whole checkpoint: repeat the command with `--resume_from_checkpoint true`.
A model is scored without training by `--do_train false --model_name_or_path out/rte-sampa`. `--do_predict` writes the
predictions for test.tsv, as gluebenchmark.com takes them. Files of your own are for run_classification.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict
from glue_arguments import parse_args
from glue_data import check_labels, load_data
from glue_metric import make_compute_metrics
from glue_submission import predictions_of, write_submission
from outputs import first_output
from quiet import quiet_other_processes
from tasks import HUB_DATASET, TASKS, GlueTask
from text_inputs import load_tokenizer, longest_input, map_labels, tokenize
from text_noise import with_noise
from text_splits import limit, remarks, scored_split, split_off
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed
from transformers.trainer_utils import PredictionOutput

from hf_sampa import SAMPaTrainer
from hf_sampa.compat import take_loss_for_mean
from hf_sampa.finetuning import BaselineTrainer, check_trained, load_config, load_model, run_main, train_and_score


def select(data: DatasetDict, splits: Iterable[str]) -> Dataset | dict[str, Dataset] | None:
    """The one of `splits` that is in the data, or for MNLI both by name, so that metrics are called `eval_matched_...`."""
    found = {split.partition("_")[2] or split: data[split] for split in splits if split in data}
    return found if len(found) > 1 else next(iter(found.values()), None)


def write_predictions(
    output: PredictionOutput,
    folder: Path,
    name: str = "test",
    *,
    task: GlueTask,
    data: DatasetDict,
    ids: tuple[int, ...],
) -> None:
    """Write what was predicted for one test set, as the benchmark takes it."""
    split = name if name in data else f"test_{name}"
    rows = data[split]
    path = write_submission(folder, split, task, rows["idx"], predictions_of(output.predictions, task, ids))
    print(f"Predictions of {len(rows)} rows of {split}: {path}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line `argv` (the process's own by default) and return the dev metrics."""
    # 1. Arguments
    model_args, glue_args, training_args = parse_args(argv)
    task = TASKS[glue_args.task_name]
    quiet_other_processes(training_args)
    set_seed(training_args.seed)  # for the new head's weights

    # 2. Data, tokenizer, model. Of a trained head every output keeps its meaning: labels are mapped to it by name.
    load_config(AutoModelForSequenceClassification, model_args)  # a model for anything else has no tokenizer
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="loading"):
        whole = load_data(task, glue_args, training_args)
    whole = split_off(whole, glue_args.train_val_split, training_args)
    limited = limit(whole, glue_args)
    check_labels(limited, task)
    limited = with_noise(limited, glue_args.label_noise)
    names = task.labels or (task.tsv_label,)
    model, labels = load_model(AutoModelForSequenceClassification, model_args, names)
    if not training_args.do_train:
        check_trained(labels, names, model_args.model_name_or_path)
    max_length = longest_input(glue_args, tokenizer, model.config)
    data = DatasetDict()
    with training_args.main_process_first(desc="tokenizing"):
        for split, rows in limited.items():
            data[split] = tokenize(rows, task.text_columns, tokenizer, max_length, glue_args.pad_to_max_length)
            if split not in task.submissions and not task.is_regression:
                data[split] = map_labels(data[split], labels.ids, labels.names)

    # 3. Trainer. All that SAMPa adds to a stock script is this choice of class, and the base class of the arguments.
    trainer_class = BaselineTrainer if training_args.method == "adamw" else SAMPaTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=select(data, ["validation", *task.dev_files]),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(task, labels.ids),
        preprocess_logits_for_metrics=first_output,
    )
    take_loss_for_mean(trainer)  # which the heads return; the plain Trainer thinks otherwise

    # 4. Train, save, score and predict
    card = {"tasks": "text-classification", "dataset_split": scored_split(glue_args)}
    if glue_args.data_dir is None:
        card |= {"dataset": f"GLUE {task.name}", "dataset_tags": HUB_DATASET, "dataset_args": task.name}
    else:
        folder = Path(glue_args.data_dir).resolve().name
        card["dataset"] = f"the local folder {folder} in the format of GLUE {task.name}"
    return train_and_score(
        trainer,
        scores=task.metrics,
        test_dataset=select(data, task.submissions),
        write_predictions=partial(write_predictions, task=task, data=limited, ids=labels.ids),
        prediction_files=tuple(task.submissions.values()),
        remarks=remarks(model_args, glue_args, whole, data, max_length),
        **card,
    )


if __name__ == "__main__":
    run_main(main)
