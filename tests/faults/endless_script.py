"""Trains on and on, and says in files which process has begun: what a launcher is killed under."""

import os
import sys
from pathlib import Path

from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from tests import tiny


class Begun(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            (Path(args.output_dir) / f"step{os.environ['RANK']}").write_text(str(os.getpid()))


if __name__ == "__main__":
    args = tiny.arguments(sys.argv[1], max_steps=1_000_000, logging_strategy="no")
    SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16), callbacks=[Begun()]).train()
