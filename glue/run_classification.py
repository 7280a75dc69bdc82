r"""Fine-tune an encoder on texts of your own with SAMPa, SAM or AdamW: classes, several labels of one text, or a score.

From a CSV file with a column `text` and a column `label`, a tenth of which is kept to score on, on one process:

    python glue/run_classification.py --train_file reviews.csv --train_val_split 0.1 \
        --model_name_or_path distilbert/distilbert-base-uncased --output_dir out/reviews

Two processes, one SAMPa pair:

    python -m hf_sampa launch glue/run_classification.py \
        --train_file train.csv --validation_file dev.csv --output_dir out/reviews-pair

Any data set on the Hub, with the names of its columns where they are not the usual ones:

    python glue/run_classification.py --dataset_name fancyzhx/ag_news --validation_split_name test \
        --text_column_names text --label_column_name label --output_dir out/news

Predictions, and nothing else: `--do_predict` writes `predictions.csv` with the probability of every class.

    python glue/run_classification.py --model_name_or_path out/reviews --test_file new.csv \
        --do_train false --do_eval false --do_predict --output_dir out/predicted

What is predicted is found from the labels, and printed: lists are several labels of one text, words and a few whole numbers are
classes, numbers with a fraction are a score. The names of the classes go into the model's configuration.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from classification_arguments import ClassificationArguments, parse_args
from datasets import DatasetDict
from outputs import first_output
from own_columns import check_texts, find_columns, require
from own_data import card_facts, load_tables, with_labels
from own_labels import Labels, read_labels, spelled_as
from own_metric import find_metrics, make_compute_metrics, score_names
from own_predictions import write_predictions
from own_problem import REGRESSION, Problem, encode, find_problem, problem_of_model, warn_of_unscored
from own_tables import Table
from quiet import quiet_other_processes
from text_inputs import load_tokenizer, longest_input, tokenize
from text_noise import with_noise
from text_splits import limit, remarks, scored_split, split_off
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput

from hf_sampa import SAMPaTrainer
from hf_sampa.compat import take_loss_for_mean
from hf_sampa.finetuning import (
    BaselineTrainer,
    ClassNames,
    check_trained,
    load_config,
    load_model,
    run_main,
    train_and_score,
)


def find_texts_and_labels(
    tables: dict[str, Table], data_args: ClassificationArguments
) -> tuple[tuple[str, ...], dict[str, Labels]]:
    """The columns of text that all tables have, and the labels of each table; a test file need not have any.

    Raises:
        ValueError: a column is not there, or holds something else.
    """
    first = next(iter(tables.values()))
    columns, label_columns = find_columns(first, data_args.text_column_names, data_args.label_column_name)
    labels = {}
    for split, table in tables.items():
        require(table, columns, "--text_column_names")
        check_texts(table, columns)
        if split == "test" and not set(label_columns) & set(table.names):
            continue
        if not label_columns:
            raise ValueError(
                f"--label_column_name: expected a column with the labels; {table.name} has the columns "
                f"{', '.join(table.names)}. Add --label_column_name with the name of one."
            )
        require(table, label_columns, "--label_column_name")
        found = read_labels(table, label_columns, data_args.label_delimiter)
        # Labels of a test set are often kept back.
        if split != "test" or any(found.values):
            labels[split] = found
    return columns, labels


def find_task(
    labels: dict[str, Labels], config: PreTrainedConfig, data_args: ClassificationArguments, train: bool
) -> tuple[Problem, dict[str, Labels]]:
    """What is predicted: what the training rows say, or without them what the model was trained for. Labels in its words."""
    if train:
        return find_problem(labels["train"], data_args.problem_type), labels
    problem = problem_of_model(config, data_args.problem_type)
    if problem.type != REGRESSION:
        labels = {split: spelled_as(found, problem.names) for split, found in labels.items()}
    return problem, labels


def make_data(
    tables: dict[str, Table], texts: tuple[str, ...], labels: dict[str, Labels], problem: Problem, classes: ClassNames
) -> DatasetDict:
    """Texts of each table, with labels as the model takes them where there are any."""
    if "validation" in labels:
        warn_of_unscored(labels["validation"], problem)
    data = DatasetDict({split: table.texts(texts) for split, table in tables.items()})
    for split, found in labels.items():
        data[split] = with_labels(data[split], encode(found, problem, classes.ids), problem.type, classes.names)
    return data


def write(output: PredictionOutput, folder: Path, *, problem: Problem, names: tuple[str, ...]) -> None:
    """Write what was predicted."""
    path = write_predictions(folder, output.predictions, problem.type, names)
    print(f"Predictions of {len(output.predictions)} rows: {path}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line `argv` (the process's own by default) and return the metrics."""
    # 1. Arguments
    model_args, data_args, training_args = parse_args(argv)
    quiet_other_processes(training_args)
    set_seed(training_args.seed)  # for the new head's weights

    # 2. Tables, and what is predicted from what
    with training_args.main_process_first(desc="loading"):
        tables = load_tables(data_args, model_args, training_args)
    texts, found = find_texts_and_labels(tables, data_args)
    config = load_config(AutoModelForSequenceClassification, model_args)
    problem, labels = find_task(found, config, data_args, training_args.do_train)
    metrics = find_metrics(problem.type, data_args.metric_name, model_args.cache_dir)

    # 3. Tokenizer and model, data as it takes them. Of a trained head every output keeps its meaning.
    tokenizer = load_tokenizer(model_args)
    model, classes = load_model(
        AutoModelForSequenceClassification, model_args, problem.names, problem_type=problem.type
    )
    if not training_args.do_train:
        words = sorted({word for each in found.values() for word in each.words})
        check_trained(classes, words, model_args.model_name_or_path)
    max_length = longest_input(data_args, tokenizer, model.config)
    whole = make_data(tables, texts, labels, problem, classes)
    whole = split_off(whole, data_args.train_val_split, training_args)
    data = DatasetDict()
    with training_args.main_process_first(desc="tokenizing"):
        for split, rows in with_noise(limit(whole, data_args), data_args.label_noise).items():
            data[split] = tokenize(rows, texts, tokenizer, max_length, data_args.pad_to_max_length)
    if training_args.process_index == 0:
        rows = ", ".join(f"{number} in {split}" for split, number in data.num_rows.items())
        print(f"Texts: {', '.join(texts)}. Predicted: {Problem(problem.type, classes.names)}. Rows: {rows}.")

    # 4. Trainer. All that SAMPa adds to a stock script is this choice of class, and the base class of the arguments.
    trainer_class = BaselineTrainer if training_args.method == "adamw" else SAMPaTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(problem.type, metrics),
        preprocess_logits_for_metrics=first_output,
    )
    take_loss_for_mean(trainer)  # which the heads return; the plain Trainer thinks otherwise

    # 5. Train, save, score and predict
    return train_and_score(
        trainer,
        scores=score_names(problem.type, metrics, data["validation"]["label"]) if "validation" in data else (),
        test_dataset=data.get("test"),
        write_predictions=partial(write, problem=problem, names=classes.names),
        tasks="text-classification",
        dataset_split=scored_split(data_args, data_args.train_split_name, data_args.validation_split_name),
        remarks=remarks(model_args, data_args, whole, data, max_length),
        **card_facts(data_args),
    )


if __name__ == "__main__":
    run_main(main)
