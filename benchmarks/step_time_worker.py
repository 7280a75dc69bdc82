"""One training process of step_time.py: trains a BERT on random tokens, a round of steps each time it is told to.

Reads one line per round from its input, `go` or `stop`, and answers each round with one line of JSON on its output.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments


# ru_maxrss counts kilobytes on Linux and bytes on macOS.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Rounds(TrainerCallback):
    """Holds the training between rounds, and times the steps of a round from end to end: data, passes, update."""

    def __init__(self, steps: int):
        self.steps = steps
        self.trainer: Trainer | None = None  # set once the trainer exists

    def on_train_begin(self, args, state, control, **kwargs):
        self._next_round(control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            print(json.dumps(self._report()), flush=True)
            self._next_round(control)

    def _next_round(self, control) -> None:
        control.should_training_stop = sys.stdin.readline().strip() != "go"
        self.bytes_before, self.started = self._bytes_sent(), time.perf_counter()

    def _report(self) -> dict[str, float]:
        return {
            "seconds_per_step": (time.perf_counter() - self.started) / self.steps,
            "bytes_per_step": (self._bytes_sent() - self.bytes_before) / self.steps,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
            "parameters": sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad),
        }

    def _bytes_sent(self) -> int:
        return self.trainer.sampa.exchange.bytes_sent if isinstance(self.trainer, SAMPaTrainer) else 0


def build_model(layers: int, hidden: int) -> BertForSequenceClassification:
    """A BERT of random weights with BERT's own proportions: heads of 32 units, feed-forward four times as wide."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
        )
    )


def build_dataset(rows: int, seq: int) -> list[dict[str, torch.Tensor]]:
    """`rows` sequences of `seq` random token numbers, without padding, each with a label of 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30000, (rows, seq), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    mask = torch.ones(seq, dtype=torch.long)
    return [{"input_ids": t, "attention_mask": mask, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def main(method: str, layers: int, hidden: int, batch: int, seq: int, rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    max_steps = (rounds + 1) * steps  # the first round is the warm-up
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "max_steps": max_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if method == "adamw":
        trainer_class, args = Trainer, TrainingArguments(**settings)
    else:
        trainer_class, args = SAMPaTrainer, SAMPaTrainingArguments(method=method, **settings)
    callback = Rounds(steps)
    # One batch more than there are steps: SAMPa reads one ahead.
    dataset = build_dataset((max_steps + 1) * batch, seq)
    trainer = trainer_class(build_model(layers, hidden), args, train_dataset=dataset, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # the output belongs to the reports
    callback.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
