"""The six runs of the demo, one after the other in the same two processes; started by demo.py under `accelerate launch`.

What trains is glue/run_glue.py and benchmarks/digits_vit.py, called with their command lines; only the measure of
sharpness is the demo's own. Process 0 prints a line per run and writes all figures to results.json in the demo's folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import digits_vit
import run_glue
import torch
from accelerate import PartialState
from glue_tsv import read_glue_folder
from make_sample import make_tiny_bert, sample_rows
from tasks import TASKS
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    ViTForImageClassification,
    default_data_collator,
)

from hf_sampa.functional import perturb_


METHODS = ("adamw", "sam", "sampa")
SAMPLE = Path(run_glue.__file__).with_name("sample")
SHARPNESS_RHO = 0.05


@dataclass(frozen=True)
class DemoTask:
    """A script's `main`, its command line, and a function that loads the trained model and its whole training set."""

    train: Callable[[list[str]], dict[str, float]]
    arguments: str
    epochs: int
    load: Callable[[Path], tuple[PreTrainedModel, dict[str, torch.Tensor]]]


def load_bert(output_dir: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    data = read_glue_folder(SAMPLE, TASKS["sst2"])["train"]
    rows = [{**tokenizer(row["sentence"]), "label": row["label"]} for row in data]
    return BertForSequenceClassification.from_pretrained(output_dir), dict(DataCollatorWithPadding(tokenizer)(rows))


def load_vit(output_dir: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    train_rows, _ = digits_vit.load_rows()
    return ViTForImageClassification.from_pretrained(output_dir), default_data_collator(train_rows)


# rho and lambda are the paper's: for GLUE and for lambda in vision the scripts have them as defaults; where labels are
# wrong the paper takes rho 0.1 for SAM and SAMPa alike (Table 7). The rest was chosen with AdamW alone; the ViT trains
# for so long that AdamW learns wrong labels by heart.
DEMO_TASKS = {
    "bert": DemoTask(
        run_glue.main,
        f"--task_name sst2 --data_dir {SAMPLE} --model_name_or_path {{folder}}/pretrained-bert --learning_rate 5e-4",
        epochs=6,
        load=load_bert,
    ),
    "vit": DemoTask(digits_vit.main, "--rho 0.1 --batch_size 64 --learning_rate 2e-3", epochs=30, load=load_vit),
}


def write_other_remarks(folder: Path) -> None:
    """Write 800 + 100 remarks in the sample's format, none of which is in the sample."""
    sample = {row["sentence"] for split in read_glue_folder(SAMPLE, TASKS["sst2"]).values() for row in split}
    rows = (row for row in sample_rows(seed=1) if row[0] not in sample)
    folder.mkdir()
    for name, size in (("train.tsv", 800), ("dev.tsv", 100)):
        lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in islice(rows, size))]
        (folder / name).write_text("\n".join(lines) + "\n")


def pretrain_bert(folder: Path, processes: PartialState, epochs: int) -> None:
    """Make the BERT that is fine-tuned: a new one, trained with AdamW on remarks that are not in the sample."""
    if processes.is_main_process:
        make_tiny_bert(folder / "new-bert")
        write_other_remarks(folder / "other-remarks")
    processes.wait_for_everyone()
    arguments = (
        f"--task_name sst2 --data_dir {folder / 'other-remarks'} --model_name_or_path {folder / 'new-bert'} "
        "--learning_rate 1e-3"
    )
    train(DemoTask(run_glue.main, arguments, epochs, load_bert), "adamw", folder, folder / "pretrained-bert", epochs)


def sharpness(model: PreTrainedModel, batch: dict[str, torch.Tensor], rho: float) -> float:
    """f(x + rho g / ||g||) - f(x), where f is the model's own mean loss over `batch` without dropout, g = grad f(x).

    Leaves `model` at the perturbed weights.
    """
    model.eval()
    params = [param for param in model.parameters() if param.requires_grad]
    loss = model(**batch).loss
    perturb_(params, torch.autograd.grad(loss, params), rho)
    with torch.no_grad():
        return (model(**batch).loss - loss).item()


def train(task: DemoTask, method: str, folder: Path, output_dir: Path, epochs: float) -> None:
    """Train and evaluate; both processes take part."""
    common = (
        f"--method {method} --output_dir {output_dir} --num_train_epochs {epochs} --use_cpu true --save_strategy no "
        "--eval_strategy epoch --logging_strategy epoch --disable_tqdm true"
    )
    # The scripts' own log lines go where the launcher's go: standard output is for the demo's progress.
    with redirect_stdout(sys.stderr):
        task.train([*task.arguments.format(folder=folder).split(), *common.split()])


def read_figures(output_dir: Path) -> dict:
    """Accuracy, its course, and the time per step without the evaluations, from what the Trainer wrote."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    runtime = next(entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry)
    return {
        "accuracy": evaluations[-1]["eval_accuracy"],
        "accuracy_curve": [(entry["epoch"], entry["eval_accuracy"]) for entry in evaluations],
        "seconds_per_step": (runtime - sum(entry["eval_runtime"] for entry in evaluations)) / state["global_step"],
    }


def main(folder: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    processes = PartialState(cpu=True)
    pretrain_bert(folder, processes, epochs=1 if quick else 8)
    results = {name: {} for name in DEMO_TASKS}
    for name, task in DEMO_TASKS.items():
        # What is loaded on first use is not to be charged to the method that happens to be first.
        train(task, METHODS[0], folder, folder / f"{name}-warm-up", epochs=0.1)
        for method in METHODS:
            started, output_dir = time.perf_counter(), folder / f"{name}-{method}"
            if processes.is_main_process:
                print(f"  {name:<5} {method:<6}", end="", flush=True)
            train(task, method, folder, output_dir, epochs=1 if quick else task.epochs)
            if processes.is_main_process:
                results[name][method] = {
                    **read_figures(output_dir),
                    "sharpness": sharpness(*task.load(output_dir), SHARPNESS_RHO),
                }
                print(f"{time.perf_counter() - started:6.1f} s", flush=True)
    if processes.is_main_process:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), quick="--quick" in sys.argv[2:])
