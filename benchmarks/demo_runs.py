"""The six runs of the demo, one after the other in the same two processes; started by demo.py under `accelerate launch`.

What trains is glue/run_glue.py and benchmarks/digits_vit.py, called with their command lines; only the measure of
sharpness is the demo's own. Everything is written to the current folder; process 0 prints a line per run and writes all
figures to results.json.
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
from typing import Any

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

from hf_sampa.functional import perturb


METHODS = ("adamw", "sam", "sampa")
SAMPLE = Path(run_glue.__file__).with_name("sample")
SHARPNESS_RHO = 0.05


@dataclass(frozen=True)
class DemoTask:
    """A script's `main`, its arguments by name, and a function that loads the trained model and its whole training set."""

    main: Callable[[list[str]], Any]
    arguments: dict[str, Any]
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
# wrong the paper takes rho 0.1 for SAM and SAMPa alike (Table 7). Sizes, learning rates and epochs were chosen so that all
# three methods learn within the demo's time: a BERT from scratch, which AdamW alone trains, stays at chance with rho 0.05.
# Several were tried, and this one taken after seeing all three: the demo shows that it runs, not which method is better.
DEMO_TASKS = {
    "bert": DemoTask(
        run_glue.main,
        {"task_name": "sst2", "data_dir": SAMPLE, "model_name_or_path": "pretrained-bert", "learning_rate": 5e-4},
        epochs=6,
        load=load_bert,
    ),
    "vit": DemoTask(digits_vit.main, {"rho": 0.1, "batch_size": 64, "learning_rate": 1e-3}, epochs=30, load=load_vit),
}


def write_other_remarks(folder: Path) -> None:
    """Write 800 + 100 remarks in the sample's format, none of which is in the sample."""
    sample = {row["sentence"] for split in read_glue_folder(SAMPLE, TASKS["sst2"]).values() for row in split}
    rows = (row for row in sample_rows(seed=1) if row[0] not in sample)
    folder.mkdir()
    for name, size in (("train.tsv", 800), ("dev.tsv", 100)):
        lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in islice(rows, size))]
        (folder / name).write_text("\n".join(lines) + "\n")


def pretrain_bert(processes: PartialState, epochs: int) -> None:
    """Make the BERT that is fine-tuned: a new one, trained with AdamW on remarks that are not in the sample."""
    new_bert, remarks = Path("new-bert"), Path("other-remarks")
    if processes.is_main_process:
        make_tiny_bert(new_bert)
        write_other_remarks(remarks)
    processes.wait_for_everyone()
    arguments = {"task_name": "sst2", "data_dir": remarks, "model_name_or_path": new_bert, "learning_rate": 1e-3}
    train(run_glue.main, arguments, "adamw", Path("pretrained-bert"), epochs)


def sharpness(model: PreTrainedModel, batch: dict[str, torch.Tensor], rho: float) -> float:
    """f(x + rho g / ||g||) - f(x), where f is the model's own mean loss over `batch` without dropout, g = grad f(x).

    Leaves `model` at the perturbed weights.
    """
    model.eval()
    params = [param for param in model.parameters() if param.requires_grad]
    loss = model(**batch).loss
    grads = torch.autograd.grad(loss, params)
    perturb(params, grads, rho, torch.nn.utils.get_total_norm(grads), out=params)
    with torch.no_grad():
        return (model(**batch).loss - loss).item()


def train(
    main: Callable[[list[str]], Any], arguments: dict[str, Any], method: str, output_dir: Path, epochs: float
) -> None:
    """Run a script's `main`; both processes take part."""
    arguments = arguments | {
        "method": method,
        "output_dir": output_dir,
        "num_train_epochs": epochs,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "disable_tqdm": True,
    }
    # The scripts' own log lines go where the launcher's go: standard output is for the demo's progress.
    with redirect_stdout(sys.stderr):
        main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])


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


def run_task(name: str, task: DemoTask, processes: PartialState, quick: bool) -> dict[str, dict]:
    """All methods on one task; the figures by method, on process 0."""
    # What is loaded on first use is not to be charged to the method that happens to be first.
    train(task.main, task.arguments, METHODS[0], Path(f"{name}-warm-up"), epochs=0.1)
    results = {}
    for method in METHODS:
        started, output_dir = time.perf_counter(), Path(f"{name}-{method}")
        if processes.is_main_process:
            print(f"  {name:<5}{method:<6}", end="", flush=True)
        train(task.main, task.arguments, method, output_dir, epochs=1 if quick else task.epochs)
        if processes.is_main_process:
            model, batch = task.load(output_dir)
            results[method] = {**read_figures(output_dir), "sharpness": sharpness(model, batch, SHARPNESS_RHO)}
            print(f"{time.perf_counter() - started:6.1f} s", flush=True)
    return results


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    processes = PartialState(cpu=True)
    pretrain_bert(processes, epochs=1 if quick else 8)
    results = {name: run_task(name, task, processes, quick) for name, task in DEMO_TASKS.items()}
    if processes.is_main_process:
        Path("results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
