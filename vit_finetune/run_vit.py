r"""Fine-tune a ViT, or any other image classifier, on CIFAR-10, CIFAR-100 or images of your own, with AdamW, SAM or SAMPa.

ViT-B/16 on CIFAR-10 from the Hub with the paper's settings, SAMPa on two GPUs:

    python -m hf_sampa launch vit_finetune/run_vit.py \
        --dataset cifar10 --output_dir out/vit-sampa --dataloader_num_workers 4 --bf16

The same numbers from one process, in about twice the time:

    python -m hf_sampa launch --config one_process vit_finetune/run_vit.py \
        --dataset cifar10 --output_dir out/vit-sampa-one --dataloader_num_workers 4 --bf16

A baseline, here on CIFAR-100 with 40 % of the training labels wrong (`--method adamw` is the other one):

    python -m hf_sampa launch vit_finetune/run_vit.py \
        --method sam --dataset cifar100 --label_noise 0.4 --output_dir out/vit-sam-noise --bf16

Without a network: the official folder (data/cifar-10-batches-py) and a model saved in a folder:

    python vit_finetune/run_vit.py --dataset cifar10 --data_dir data --model_name_or_path models/vit-base \
        --output_dir out/vit-offline

A small ViT from random weights, on two CPU processes:

    python -m hf_sampa launch --config cpu_2_processes vit_finetune/run_vit.py \
        --dataset cifar10 --data_dir data --from_scratch --hidden_size 128 --num_hidden_layers 4 --patch_size 4 \
        --learning_rate 1e-3 --output_dir out/vit-small

Images of your own, in one folder per class, a tenth of them held out to be scored (or `--data_dir` for a folder with train/,
validation/ and test/, `--dataset_name` for a data set on the Hub):

    python -m hf_sampa launch vit_finetune/run_vit.py \
        --train_dir pictures --train_val_split 0.1 --output_dir out/pictures --bf16

What the saved model says of further images, which lie side by side in a folder, as a table in out/pictures/predictions.csv:

    python vit_finetune/run_vit.py --do_train false --do_eval false --do_predict --test_dir new_pictures \
        --model_name_or_path out/pictures --output_dir out/pictures

An interrupted run goes on with `--resume_from_checkpoint true`. Metrics are written to all_results.json in the output
folder, what was logged on the way to trainer_state.json.
"""

import logging
from pathlib import Path

from datasets import disable_progress_bars
from image_data import ImageDataset, names_of
from image_predictions import compute_accuracy, only_logits, write_predictions
from image_sources import open_source
from image_task import ImageTask, load_image_task
from image_transforms import ImageTransform
from transformers import set_seed
from transformers.trainer_utils import PredictionOutput
from vit_arguments import DataArguments, ViTTrainingArguments, parse_args
from vit_model import load_classifier

from hf_sampa import SAMPaTrainer
from hf_sampa.finetuning import BaselineTrainer, corrupt_labels, run_main, train_and_score


def show_messages(training_args: ViTTrainingArguments) -> None:
    """Leave warnings and progress bars to the main process, as Trainer does; which images it takes, it says in any case."""
    logging.basicConfig(level=logging.ERROR if training_args.process_index else logging.WARNING)
    if training_args.process_index or training_args.disable_tqdm:
        disable_progress_bars()
    if not training_args.process_index:
        logging.getLogger("image_task").setLevel(logging.INFO)


def with_noise(task: ImageTask, share: float, seed: int) -> ImageTask:
    """The task with a share of its training labels replaced by wrong ones."""
    if task.train is None:
        return task
    labels = corrupt_labels(task.train.labels, share, len(task.label_names), seed)
    return task._replace(train=task.train._replace(labels=labels))


def remarks_on(task: ImageTask, data_args: DataArguments, random_weights: bool) -> list[str]:
    """What the model card says of the start and of what was done to the images."""
    found = ["starting from random weights"] if random_weights else []
    if task.train is not None:
        crop = {"padded": "crops of padded images", "resized": "windows of 8 to 100 % of their area"}
        how = "without augmentation"
        if data_args.crop_in_force is not None:
            how = f"with augmentation ({crop[data_args.crop_in_force]}, half of them mirrored)"
        found.append(f"trained on {len(task.train.images)} images, {how}")
        if data_args.label_noise:
            found.append(f"of their labels {data_args.label_noise:.0%} were replaced at random")
    return found + task.remarks


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line `argv` (the process's own by default) and return the metrics on the images that are scored."""
    # 1. Arguments. The seed comes first, so that every process draws the same new weights.
    model_args, data_args, training_args = parse_args(argv)
    show_messages(training_args)
    set_seed(training_args.seed)

    # 2. Images and labels, as far as they are needed. Only the training labels are corrupted.
    with training_args.main_process_first(desc="loading the images"):
        source = open_source(data_args, model_args.token, model_args.cache_dir)
        task = load_image_task(
            source,
            data_args,
            train=training_args.do_train,
            evaluate=training_args.do_eval,
            predict=training_args.do_predict,
        )
    task = with_noise(task, data_args.label_noise, training_args.seed)

    # 3. Model, and datasets that turn an image into what it reads. A trained head keeps its order of the classes.
    model, labels, image_processor = load_classifier(model_args, task.label_names, training_args.do_train)
    task = task.with_labels(labels.ids)
    plain = ImageTransform(image_processor, crop=None)
    varied = ImageTransform(image_processor, crop=data_args.crop_in_force)
    train_dataset, eval_dataset, test_dataset = (
        None if images is None else ImageDataset(images, transform)
        for images, transform in ((task.train, varied), (task.evaluation, plain), (task.test, plain))
    )

    # 4. Trainer. This line, and the class of the arguments, is all that SAMPa adds to a stock script.
    trainer_class = BaselineTrainer if training_args.method == "adamw" else SAMPaTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=image_processor,
        compute_metrics=compute_accuracy,
        preprocess_logits_for_metrics=only_logits,
    )

    # 5. Training, evaluation, predictions.
    def write(output: PredictionOutput, folder: Path) -> None:
        path = write_predictions(folder, names_of(task.test.images), output.predictions, labels.names)
        print(f"Predictions of {len(output.predictions)} images: {path}")

    return train_and_score(
        trainer,
        scores=["accuracy"],
        test_dataset=test_dataset,
        write_predictions=write,
        tasks="image-classification",
        dataset_split=task.scored,
        finetuned_from=None if model_args.random_weights else model_args.model_name_or_path,
        remarks=remarks_on(task, data_args, model_args.random_weights),
        **source.card,
    )


if __name__ == "__main__":
    run_main(main)
