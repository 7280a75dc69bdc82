"""What a model card says of a run: results, curve, hyperparameters, cost, and how to run it again."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub import EvalResult
from transformers import Trainer


MOST_ROWS = 30
# What an evaluation logs that is no result.
COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
PACKAGES = ("hf_sampa", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
# Listed always, and first.
MAIN = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed")
# Where things are, who is told and what is shown: not part of what was computed.
NOT_OF_THE_COMPUTATION = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica", "resume_from_checkpoint"),
    *("do_train", "do_eval", "do_predict", "eval_on_start", "deepspeed", "fsdp", "fsdp_config", "accelerator_config"),
    *("overwrite_output_dir", "num_train_epochs", "max_steps", "data_dir", "average_tokens_across_devices", "trackio_space_id", "lmbda", "diagnostics_steps"),
)  # fmt: skip
PREFIXES_NOT_OF_THE_COMPUTATION = (
    "hub_",
    "push_to_hub",
    "logging_",
    "save_",
    "eval_",
    "per_device_",
    "ddp_",
    "local_rank",
)
SECRET = re.compile(r"(^|[-_])(token|key|secret|password|credentials?)$", re.IGNORECASE)


def evaluation(trainer: Trainer) -> dict[str, float]:
    """The results of the weights that the card is of, by the names that `Trainer` logs them under."""
    history, state = trainer.state.log_history, trainer.state
    ended = max((i for i, line in enumerate(history) if "train_runtime" in line), default=None)
    after = history[ended:] if ended is not None else []
    if not any(_is_evaluation(line) for line in after):
        after = history
        if ended is not None and trainer.args.load_best_model_at_end and state.best_global_step:
            after = [line for line in history if line.get("step") == state.best_global_step]
    found: dict[str, float] = {}
    for line in after:
        found.update({name: value for name, value in line.items() if _is_result(name, value)})
    return found


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in line)


def _is_result(name: str, value: Any) -> bool:
    return name.startswith("eval_") and not name.endswith(COSTS) and isinstance(value, int | float)


def results(trainer: Trainer, task: str, dataset: dict[str, str | None]) -> list[EvalResult]:
    """One entry for the card's model index per metric; `dataset` has `name`, `type`, `config` and `split`."""
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    found = []
    for key, value in evaluation(trainer).items():
        metric = key.removeprefix("eval_")
        name = max((name for name in names if metric.startswith(f"{name}_")), key=len, default="")
        metric = metric.removeprefix(f"{name}_")
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=dataset["type"] or dataset["name"] or "unknown",
                dataset_name=dataset["name"] or "unknown",
                dataset_config=dataset["config"],
                dataset_split="_".join(filter(None, (dataset["split"], name))) or None,
                metric_type=metric,
                metric_name=metric.replace("_", " "),
                # JSON has neither infinity nor NaN.
                metric_value=value if math.isfinite(value) else str(value),
            )
        )
    return found


def curve(history: list[dict[str, Any]]) -> str:
    """A Markdown table of the run; empty where nothing was logged.

    A line for every evaluation, with the training figures logged last before it; without evaluations, for every log line.
    """
    rows: dict[int, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    evaluated = any(_is_evaluation(line) and "train_runtime" not in line for line in history)
    for line in history:
        if "loss" in line:
            training = {
                name: line[name] for name in ("loss", "perturbed_loss", "sharpness", "grad_norm") if name in line
            }
        if "train_runtime" in line or not (_is_evaluation(line) if evaluated else "loss" in line):
            continue
        own = {name: value for name, value in line.items() if _is_result(name, value)}
        rows.setdefault(line["step"], {"step": line["step"], "epoch": line["epoch"], **training}).update(own)
    lines = list(rows.values())
    stride = -(-len(lines) // MOST_ROWS)
    if stride > 1:
        lines = [line for i, line in enumerate(lines) if (len(lines) - 1 - i) % stride == 0]
    names = list(dict.fromkeys(name for line in lines for name in line))
    if not lines:
        return ""
    table = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    table += [[_shown(line.get(name)) for name in names] for line in lines]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return text if stride == 1 else f"{text}\n\nOf the logged lines, one in {stride} is shown."


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def at_the_end(trainer: Trainer, seconds_per_step: float | None) -> list[str]:
    """Sharpness at the end, and time per step."""
    history, lines = (
        trainer.state.log_history,
        [f"steps: {trainer.state.global_step}, epochs: {trainer.state.epoch or 0:.4g}"],
    )
    last = next((line for line in reversed(history) if "sharpness" in line), None)
    if last is not None:
        lines.append(
            f"sharpness over the last logged steps, loss at the perturbed weights less the clean one: {last['sharpness']:.4g}"
        )
    measured = next((line for line in reversed(history) if "held_out_sharpness" in line), None)
    if measured is not None:
        lines.append(
            f"on held-out batches at step {measured['step']}: sharpness {measured['held_out_sharpness']:.4g}, largest Hessian "
            f"eigenvalue {measured['hessian_eigenvalue']:.4g}"
        )
    if seconds_per_step is not None:
        lines.append(f"seconds per step: {seconds_per_step:.4g}")
    return lines


def hyperparameters(trainer: Trainer, total_batch_size: int) -> dict[str, Any]:
    """Settings of the run: the main ones, what is SAMPa's, and whatever else is not as transformers has it."""
    args, mesh = trainer.args, trainer.args.mesh
    roles = (
        f"{mesh.world_size}: {mesh.num_replicas} at perturbed and {mesh.num_replicas} at look-ahead weights"
        if mesh.paired
        else "1, in both roles in turn"
        if args.method == "sampa"
        else f"{mesh.world_size}, data parallel"
    )
    found = {name: getattr(args, name) for name in MAIN if getattr(args, name) is not None}
    found |= {
        "method": args.method,
        "timing": "parallel, as in SAMPa" if args.method == "sampa" else "sequential, as in SAM",
        **_recipe(trainer),
        "rho": args.rho,
        **({"lmbda": args.lmbda} if args.method == "sampa" else {}),
        "processes": roles,
        "total_train_batch_size": total_batch_size,
        "train_batch_size_per_process": trainer._train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "eval_batch_size_per_process": args.per_device_eval_batch_size,
        **({"training_steps": args.max_steps} if args.max_steps > 0 else {"num_epochs": args.num_train_epochs}),
        "optimizer": _optimizer(args),
    }
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        hidden = name in NOT_OF_THE_COMPUTATION or name.startswith(PREFIXES_NOT_OF_THE_COMPUTATION) or "token" in name
        if name in found or hidden or name.startswith("adam_"):
            continue
        default = _default(field)
        if value != default and (value or default):  # nothing is nothing, whether False, None or an empty list
            found[name] = value
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _recipe(trainer: Trainer) -> dict[str, str]:
    if trainer._recipe is not None:
        parts = {kind: trainer._recipe.settings[kind] for kind in trainer._recipe.changed_parts()}
        return {"recipe": ", ".join(f"{kind} {part}" for kind, part in parts.items()) or "SAM's own"}
    arguments = ", ".join(f"{name} = {value}" for name, value in trainer.args.variant_args.items())
    return {"variant": trainer.args.variant, "variant_args": arguments or "none"}


def _optimizer(args: Any) -> str:
    name = getattr(args.optim, "value", args.optim)
    if "adam" not in name:
        return f"{name} {args.optim_args or ''}".strip()
    return f"{name}, betas ({args.adam_beta1}, {args.adam_beta2}), epsilon {args.adam_epsilon} {args.optim_args or ''}".strip()


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def command(world_size: int) -> str:
    """How this process, and its peers, were started; without secrets."""
    script = sys.argv[0]
    if not script.endswith(".py") or "ipykernel" in script:
        return "Not from a script: the hyperparameters above are arguments of `SAMPaTrainingArguments`."
    words, hide = [], False
    for word in sys.argv[1:]:
        name, equals, value = word.partition("=")
        if hide or word.startswith("hf_"):
            words.append("HIDDEN")
        else:
            words.append(f"{name}=HIDDEN" if equals and (SECRET.search(name) or value.startswith("hf_")) else word)
        hide = not hide and word.startswith("-") and not equals and bool(SECRET.search(word))
    start = ["python"]
    if world_size > 1:
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = ["--nnodes", str(world_size // on_this_node)] if world_size > on_this_node else []
        start = ["torchrun", *nodes, "--nproc_per_node", str(on_this_node)]
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    return f"```bash\n{threads}{shlex.join([*start, script, *words])}\n```"


def versions() -> dict[str, str]:
    """Of Python and the libraries that a run rests on, those that are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
