r"""Fine-tune an encoder on one of the nine GLUE tasks with SAMPa, SAM or AdamW, with the SAMPa paper's settings.

Two processes, one SAMPa pair (on a machine without GPUs: accelerate_configs/cpu_2_processes.yaml):

    accelerate launch --config_file accelerate_configs/gpu_2.yaml glue/run_glue.py \
        --task_name rte --method sampa --output_dir out/rte-sampa

One process, the same numbers in about twice the time:

    accelerate launch --config_file accelerate_configs/one_process.yaml glue/run_glue.py \
        --task_name rte --method sampa --output_dir out/rte-sampa-one

The baselines are `--method sam` and `--method adamw`, data parallel over the processes.

Without the Hub, from a folder of official GLUE files and a model folder (here the sample that ships with the project, and
a folder without weights, which is trained from scratch):

    python glue/make_sample.py --tiny_bert out/tiny-bert
    python glue/run_glue.py --task_name sst2 --data_dir glue/sample --model_name_or_path out/tiny-bert \
        --learning_rate 1e-3 --num_train_epochs 8 --output_dir out/sample-sampa

A run that was stopped goes on from its last whole checkpoint: repeat the command with `--resume_from_checkpoint true`.
A model is scored without training by `--do_train false --model_name_or_path out/rte-sampa`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from glue_arguments import GlueArguments, parse_args
from glue_metric import make_compute_metrics
from glue_tsv import read_glue_folder
from tasks import HUB_DATASET, TASKS, GlueTask
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.finetuning import BaselineTrainer, run_main, train_and_score


logger = logging.getLogger(__name__)


def load_data(task: GlueTask, glue_args: GlueArguments) -> DatasetDict:
    """Raw splits "train" and the task's dev sets, cut to the number of samples asked for."""
    if glue_args.data_dir is None:
        data = load_dataset(HUB_DATASET, task.name)
    else:
        data = read_glue_folder(glue_args.data_dir, task)
    limits = {"train": glue_args.max_train_samples, **dict.fromkeys(task.dev_files, glue_args.max_eval_samples)}
    return DatasetDict({split: data[split] if n is None else data[split].take(n) for split, n in limits.items()})


def load_model(name_or_path: str, task: GlueTask) -> PreTrainedModel:
    """Encoder with a new head for the task, in fp32: half-precision weights would round SAM's perturbation away."""
    names = task.labels or (task.tsv_label,)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    folder = Path(name_or_path)
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in weights):
        logger.warning("%s holds no weights: the model is trained from scratch.", folder)
        config = AutoConfig.from_pretrained(folder, **labels)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(name_or_path, dtype=torch.float32, **labels)


def make_tokenize(task: GlueTask, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable:
    """Function for `Dataset.map`: the task's one or two texts to token ids. Padding is left to the collator."""
    max_length = min(max_length, tokenizer.model_max_length)
    return lambda rows: tokenizer(
        *(rows[column] for column in task.text_columns), truncation=True, max_length=max_length
    )


def select_eval_dataset(data: DatasetDict, task: GlueTask) -> Dataset | dict[str, Dataset]:
    """The dev set, or for MNLI both by name, so that metrics are called `eval_matched_...`, `eval_mismatched_...`."""
    if len(task.dev_files) == 1:
        return data["validation"]
    return {split.removeprefix("validation_"): data[split] for split in task.dev_files}


def quiet_other_processes(training_args: SAMPaTrainingArguments) -> None:
    """Leave warnings and progress bars to the main process, as Trainer does."""
    logging.basicConfig(level=logging.ERROR if training_args.process_index else logging.WARNING)
    if training_args.process_index or training_args.disable_tqdm:
        disable_progress_bars()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line `argv` (the process's own by default) and return the dev metrics."""
    # 1. Arguments
    glue_args, training_args = parse_args(argv)
    task = TASKS[glue_args.task_name]
    quiet_other_processes(training_args)
    set_seed(training_args.seed)  # for the new head's weights

    # 2. Data, tokenizer, model
    tokenizer = AutoTokenizer.from_pretrained(glue_args.model_name_or_path)
    with training_args.main_process_first(desc="loading and tokenizing"):
        data = load_data(task, glue_args)
        texts = [column for column in data["train"].column_names if column != "label"]
        data = data.map(make_tokenize(task, tokenizer, glue_args.max_length), batched=True, remove_columns=texts)
    model = load_model(glue_args.model_name_or_path, task)

    # 3. Trainer. All that SAMPa adds to a stock script is this choice of class, and the base class of the arguments.
    trainer_class = BaselineTrainer if training_args.method == "adamw" else SAMPaTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=select_eval_dataset(data, task),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(task),
    )
    # The heads return a mean, though they accept num_items_in_batch (transformers #47688): tell the plain Trainer.
    trainer.loss_is_scaled_for_ga = False

    # 4. Train, save and score
    card = {"tasks": "text-classification", "dataset_split": "validation"}
    if glue_args.data_dir is None:
        card |= {"dataset": f"GLUE {task.name}", "dataset_tags": HUB_DATASET, "dataset_args": task.name}
    else:
        folder = Path(glue_args.data_dir).resolve().name
        card["dataset"] = f"the local folder {folder} in the format of GLUE {task.name}"
    card["remarks"] = [f"inputs are truncated to {glue_args.max_length} tokens"]
    if glue_args.max_train_samples is not None:
        card["remarks"].append(f"trained on the first {len(data['train'])} examples only")
    return train_and_score(trainer, **card)


if __name__ == "__main__":
    run_main(main)
