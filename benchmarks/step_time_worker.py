"""One training process of step_time.py: trains a BERT on random tokens, a round of steps each time it is told to.

Reads one line per round from its input, `go`, `profile` or `stop`, and answers each round with one line of JSON on its
output. A round that is profiled is slower, and its answer says where the time went.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from bench_trainer import make_trainer
from step_phases import milliseconds_by_phase
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from hf_sampa import SAMPaTrainer


# ru_maxrss counts kilobytes on Linux and bytes on macOS.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Rounds(TrainerCallback):
    """Holds the training between rounds, and times the steps of a round from end to end: data, passes, update."""

    reads_model = False

    def __init__(self, steps: int):
        self.steps = steps
        self.trainer: Trainer | None = None  # set once the trainer exists
        self.profiler: profile | None = None  # of the round in progress

    def on_train_begin(self, args, state, control, **kwargs):
        self._next_round(control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            print(json.dumps(self._report()), flush=True)
            self._next_round(control)

    def _next_round(self, control) -> None:
        line = sys.stdin.readline().strip()
        control.should_training_stop = line not in ("go", "profile")
        # Everything runs on the CPU, so its clock has seen all there is.
        self.profiler = profile(activities=[ProfilerActivity.CPU]) if line == "profile" else None
        if self.profiler:
            self.profiler.start()
        self.bytes_before, self.started = self._bytes_sent(), time.perf_counter()

    def _report(self) -> dict:
        seconds = (time.perf_counter() - self.started) / self.steps
        report = {
            "seconds_per_step": seconds,
            # DDP does not tell.
            "bytes_per_step": None if self._in_ddp() else (self._bytes_sent() - self.bytes_before) / self.steps,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
            "parameters": sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad),
        }
        if self.profiler:
            self.profiler.stop()
            intervals = [
                (event.name, event.time_range.start, event.time_range.end) for event in self.profiler.events()
            ]
            report["milliseconds"] = milliseconds_by_phase(intervals, total=1000 * seconds, steps=self.steps)
        return report

    def _bytes_sent(self) -> int:
        return self.trainer.sampa.exchange.bytes_sent if isinstance(self.trainer, SAMPaTrainer) else 0

    def _in_ddp(self) -> bool:
        return self.trainer.args.world_size > 1 and not isinstance(self.trainer, SAMPaTrainer)


def main(method: str, rounds: int, steps: int, **settings) -> None:
    torch.set_num_threads(1)
    callback = Rounds(steps)
    # One round to warm up, and one to be profiled.
    callback.trainer = make_trainer(method, callback, max_steps=(rounds + 2) * steps, use_cpu=True, **settings)
    callback.trainer.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
