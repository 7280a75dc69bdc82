"""Seconds per step of LoRA with AdamW, with SAMPa's passes in turn, and with both gradients in one pass, side by side on one process.

    python benchmarks/adapters.py                         # encoders of 67 and 350 million weights, 1 x 8 tokens, one thread
    python benchmarks/adapters.py --models 67M --batch 1 2 4 8 --seq 8 32 --rounds 5
    python benchmarks/adapters.py --device cuda --bf16 --batch 1 2 4 8 --seq 128

All steps are steps of the real Trainer or SAMPaTrainer, with AdamW beneath and LoRA of rank 8 on queries and values. The methods take turns,
a round of each and again, so that a machine that slows down slows all. The first steps of a round, in which SAMPa compares both ways and
looks at the contents of all frozen weights, are not counted. Peak memory is that of a process of its own on a CPU, and what torch has allocated on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tables import as_table
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments


MODELS = {
    "67M": {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072},
    "350M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
# What is `concurrent`; None of AdamW, the last one at both batches in one, which is the least that two gradients take.
METHODS = {"AdamW": None, "SAMPa, passes in turn": False, "SAMPa, one pass": True, "AdamW, twice the batch": None}
WARM_UP = 8


class Tokens(Dataset):
    """Random rows of one length."""

    def __init__(self, count: int, length: int):
        self.rows = torch.randint(5, 30_000, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": index % 2}


class Clock(TrainerCallback):
    """Seconds from the end of each step to the end of the next."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:])]  # noqa: B905


def model_of(name: str) -> torch.nn.Module:
    """An encoder with adapters; its weights do not matter for time."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**MODELS[name]))
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def train(
    model: torch.nn.Module, method: str, batch: int, seq: int, steps: int, options: argparse.Namespace
) -> list[float]:
    """Seconds of each counted step."""
    clock, concurrent = Clock(), METHODS[method]
    batch *= 1 + method.endswith("twice the batch")
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "max_steps": WARM_UP + steps,
            "use_cpu": options.device == "cpu",
            "bf16": options.bf16,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        data = Tokens((WARM_UP + steps + 1) * batch, seq)
        if concurrent is None:
            trainer = Trainer(model, TrainingArguments(**common), train_dataset=data, callbacks=[clock])
        else:
            args = SAMPaTrainingArguments(**common, method="sampa", concurrent=concurrent)
            trainer = SAMPaTrainer(model, args, train_dataset=data, callbacks=[clock])
        trainer.train()
    return clock.seconds


def measure(name: str, batch: int, seq: int, options: argparse.Namespace, told: tqdm) -> dict[str, Any]:
    """Medians of all methods at one model and size."""
    model, seconds = model_of(name), {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method in METHODS:
            told.set_postfix_str(f"{name}, {batch} x {seq}, {method}")
            seconds[method] += train(model, method, batch, seq, options.steps, options)
            told.update()
    found = {method: median(values) for method, values in seconds.items()}
    return {"model": name, "batch": batch, "seq": seq, "seconds": found, "memory": memory(name, batch, seq, options)}


def memory(name: str, batch: int, seq: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each method in GiB, each in a process of its own."""
    found = {}
    for method in METHODS:
        command = [
            sys.executable,
            __file__,
            "--peak_of",
            method,
            "--models",
            name,
            "--batch",
            str(batch),
            "--seq",
            str(seq),
        ]
        command += [
            "--device",
            options.device,
            "--threads",
            str(options.threads),
            *(["--bf16"] if options.bf16 else []),
        ]
        found[method] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def peak_of(method: str, options: argparse.Namespace) -> float:
    """Of this process, in GiB."""
    train(model_of(options.models[0]), method, options.batch[0], options.seq[0], 2, options)
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(results: list[dict[str, Any]]) -> str:
    """One row for each model and size."""
    header = ["model", "batch x tokens", *METHODS, "one pass / AdamW", "one pass / in turn", "peak memory, GiB"]
    rows = []
    for each in results:
        adamw, in_turn, one_pass, _ = each["seconds"].values()
        rows.append(
            [
                each["model"],
                f"{each['batch']} x {each['seq']}",
                *(f"{1000 * value:.1f} ms" for value in each["seconds"].values()),
                f"{one_pass / adamw:.2f}",
                f"{one_pass / in_turn:.2f}",
                "; ".join(f"{value:.2f}" for value in each["memory"].values()),
            ]
        )
    return as_table(header, rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="sizes of the frozen model")
    made.add_argument("--batch", nargs="+", type=int, default=[1], help="sequences per batch")
    made.add_argument("--seq", nargs="+", type=int, default=[8], help="tokens per sequence")
    made.add_argument("--rounds", type=int, default=3, help="rounds of each method")
    made.add_argument("--steps", type=int, default=12, help="steps that are counted in a round")
    made.add_argument("--threads", type=int, default=1, help="threads of the process on a CPU")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    made.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    made.add_argument("--json", type=Path, help="where to write the figures, too")
    made.add_argument("--peak_of", choices=METHODS, help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hf_sampa").setLevel(logging.ERROR)
    if options.peak_of:
        print(peak_of(options.peak_of, options))
        return
    sizes = [(name, batch, seq) for name in options.models for batch in options.batch for seq in options.seq]
    with tqdm(total=len(sizes) * options.rounds * len(METHODS), unit="round") as told:
        results = [measure(*size, options, told) for size in sizes]
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
