"""A user's script, as small as it gets: trains the tiny BERT and writes its weights.

Usage: train_script.py OUTPUT_DIR [--max_steps N] [--save_steps N] [--resume]; started by python, torchrun or accelerate.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from tests import tiny


class Slowly(TrainerCallback):
    """Gives the test time to kill the run between two saves."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slowly", action="store_true")
    options = parser.parse_args()
    args = SAMPaTrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        save_steps=options.save_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
    )
    callbacks = [Slowly()] if options.slowly else []
    trainer = SAMPaTrainer(model=tiny.bert(0.1), args=args, train_dataset=tiny.sentences(18), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=options.resume)
    (options.output_dir / f"world{os.environ.get('RANK', 0)}").write_text(str(args.world_size))
    save_file(trainer.model.state_dict(), options.output_dir / f"weights{os.environ.get('RANK', 0)}.safetensors")


if __name__ == "__main__":
    main()
