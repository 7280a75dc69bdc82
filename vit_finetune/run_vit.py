r"""Fine-tune a ViT on CIFAR-10, CIFAR-100 or a folder of images, with AdamW, SAM or SAMPa.

ViT-B/16 on CIFAR-10 from the Hub with the paper's settings, SAMPa on two GPUs:

    accelerate launch --config_file accelerate_configs/gpu_2.yaml vit_finetune/run_vit.py \
        --dataset cifar10 --output_dir out/vit-sampa --dataloader_num_workers 4 --bf16

The same numbers from one process, in about twice the time:

    accelerate launch --config_file accelerate_configs/one_process.yaml vit_finetune/run_vit.py \
        --dataset cifar10 --output_dir out/vit-sampa-one --dataloader_num_workers 4 --bf16

A baseline, here on CIFAR-100 with 40 % of the training labels wrong (`--method adamw` is the other one):

    accelerate launch --config_file accelerate_configs/gpu_2.yaml vit_finetune/run_vit.py \
        --method sam --dataset cifar100 --label_noise 0.4 --output_dir out/vit-sam-noise --bf16

Without a network: the official folder (data/cifar-10-batches-py) and a model saved in a folder:

    python vit_finetune/run_vit.py --dataset cifar10 --data_dir data --model_name_or_path models/vit-base \
        --output_dir out/vit-offline

A small ViT from random weights, on two CPU processes:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml vit_finetune/run_vit.py \
        --dataset cifar10 --data_dir data --from_scratch --hidden_size 128 --num_hidden_layers 4 --patch_size 4 \
        --learning_rate 1e-3 --output_dir out/vit-small

An interrupted run goes on with `--resume_from_checkpoint true`. Metrics are written to all_results.json in the output
folder, what was logged on the way to trainer_state.json.
"""

from pathlib import Path

import numpy as np
from image_data import HUB_COLUMNS, ImageDataset, ImageTransform, corrupt_labels, load_image_task
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction, set_seed
from vit_arguments import parse_args
from vit_model import load_model

from hf_sampa import SAMPaTrainer
from hf_sampa.finetuning import BaselineTrainer, run_main, train_and_score


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose largest logit, of ``(n, classes)``, is that of their label ``(n,)``."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float(accuracy_score(prediction.label_ids, predicted))}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line `argv` (the process's own by default) and return the metrics on the test images."""
    # 1. Arguments. The seed comes first, so that every process draws the same new weights.
    model_args, data_args, training_args = parse_args(argv)
    set_seed(training_args.seed)

    # 2. Images and labels. Only the training labels are corrupted.
    with training_args.main_process_first(desc="loading the images"):
        task = load_image_task(data_args.dataset, data_args.data_dir, data_args.max_image_pixels)
    noisy_labels = corrupt_labels(
        task.train.labels, data_args.label_noise, len(task.label_names), seed=training_args.seed
    )

    # 3. Model, and datasets that turn an image into what it reads.
    model, image_processor = load_model(model_args, task.label_names)
    train_dataset = ImageDataset(
        task.train._replace(labels=noisy_labels), ImageTransform(image_processor, augment=data_args.augment)
    )
    eval_dataset = ImageDataset(task.test, ImageTransform(image_processor, augment=False))

    # 4. Trainer. This line, and the class of the arguments, is all that SAMPa adds to a stock script.
    trainer_class = BaselineTrainer if training_args.method == "adamw" else SAMPaTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=image_processor,
        compute_metrics=compute_accuracy,
    )

    # 5. Training, and evaluation on the test images.
    card = {"tasks": "image-classification", "dataset_split": "test", "finetuned_from": model_args.finetuned_from}
    if data_args.data_dir is None:
        card |= {"dataset": data_args.dataset, "dataset_tags": HUB_COLUMNS[data_args.dataset][0]}
    else:
        folder = Path(data_args.data_dir).resolve().name
        card["dataset"] = f"the local folder {folder} in the format of {data_args.dataset}"
    card["remarks"] = [
        f"trained on {len(train_dataset)} images, {'with' if data_args.augment else 'without'} augmentation"
    ]
    if data_args.label_noise:
        card["remarks"].append(f"of their labels {data_args.label_noise:.0%} were replaced at random")
    return train_and_score(trainer, **card)


if __name__ == "__main__":
    run_main(main)
