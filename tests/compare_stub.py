"""Stands in for ``python -m hf_sampa launch --config NAME SCRIPT ...``: a run of any script, in milliseconds.

Score 0.5 + learning_rate + seed / 1000, or nan of a ``--nan_at`` learning rate or seed; a run with ``--fail`` fails the first ``fail``
times, one with ``--sleep`` leaves a checkpoint, whole or ``--torn``, and sleeps, unless it is resumed; one with ``--brief`` sleeps.
"""

import json
import sys
import time
from pathlib import Path


_, _, config, script, *rest = sys.argv[1:]
given = dict(zip((word.removeprefix("--") for word in rest[::2]), rest[1::2], strict=True))
output = Path(given["output_dir"])
output.mkdir(parents=True, exist_ok=True)
with (output / "calls.txt").open("a") as calls:
    calls.write(json.dumps({**given, "config": config}) + "\n")
count = len((output / "calls.txt").read_text().splitlines())
print("begins", given["seed"], flush=True)
if count <= int(given.get("fail", 0)):
    sys.exit(given.get("say", "boom: expected a better day"))
time.sleep(float(given.get("brief", 0)))
if "sleep" in given and "resume_from_checkpoint" not in given:
    (output / "checkpoint-1").mkdir(exist_ok=True)
    (output / "checkpoint-1" / "trainer_state.json").write_text("{" if "torn" in given else '{"global_step": 1}')
    time.sleep(float(given["sleep"]))
score = 0.5 + float(given.get("learning_rate", 0)) + int(given["seed"]) / 1000
if "nan_at" in given and given["nan_at"] in (given.get("learning_rate"), given["seed"]):
    score = float("nan")
results = {
    "eval_accuracy": score,
    "eval_loss": 0.1 - float(given.get("loss", 0)),
    "epoch": float(given.get("num_train_epochs", 1)),
}
results["train_seconds_per_step"] = {"adamw": 1.0, "sam": 2.0, "sampa": 1.1}[given["method"]]
history = [{"step": step, "eval_accuracy": score - 0.1 / step} for step in (1, 2, 3)]
history.append({"step": 3, "held_out_sharpness": 0.02})
if given.get("silent"):
    results = {"epoch": 1.0}
(output / "all_results.json").write_text(json.dumps(results))
(output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
