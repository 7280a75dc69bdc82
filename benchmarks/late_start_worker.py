"""One training process of late_start.py: a whole run each time it is told to `go`, and its seconds as a line of JSON."""

from __future__ import annotations

import json
import sys
import time

import torch
from bench_trainer import make_trainer
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of the training alone: what comes before it and after it, and the first step, which warms up, are left out."""

    reads_model = False
    seconds = began = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.began = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.began


def main(method: str, start: float, steps: int, **settings) -> None:
    torch.set_num_threads(1)
    while sys.stdin.readline().strip() == "go":
        clock = Clock()
        trainer = make_trainer(method, clock, max_steps=steps + 1, use_cpu=True, bf16=False, **settings)
        if method == "sampa":
            trainer.args.sampa_start = start
        trainer.train()
        print(json.dumps({"seconds": clock.seconds}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
